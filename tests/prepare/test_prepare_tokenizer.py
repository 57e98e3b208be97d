"""What a tokenizer is trained on; that it is made once and whole is in test_prepare."""

import numpy as np

from lemur_jax.prepare.prepare_tokenizer import sample


def test_the_sample_is_bounded_and_does_not_depend_on_the_order():
    records = [{"text": f"{n} ".encode() * 50} for n in range(500)]
    texts = sample(iter(records), 5000)
    assert 4000 < sum(len(text.encode()) for text in texts) <= 5000
    assert texts == sample(reversed(records), 5000)
    # Spread over the corpus: the mean index of a fair choice of about 30.
    assert 150 < np.mean([int(text.split()[0]) for text in texts]) < 350


def test_the_sample_leaves_out_what_is_no_text():
    talk = '[{"role": "user", "content": "Grüße?"}, {"role": "assistant", "content": "Ja."}]'.encode()
    records = [{"text": b"\xff\xfe"}, {"messages": b"no json"}, {"messages": b'[{"role": "user"}]'}]
    records += [{"text": b'{"txt": "the excerpt of a bad row"}', "error": b'{"reason": "no field"}'}]
    records += [{"messages": talk}]
    assert [text for text in sample(records, 1000) if text] == ["Grüße?\n\nJa."]
