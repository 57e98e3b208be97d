"""Sample generations for the report, from the newest checkpoint of each run."""

from collections.abc import Sequence

from etils import epath

from lemur_jax.infer.complete import complete
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import load

MAX_NEW_TOKENS = 64
# The most likely text of a small model is one line break after the other. Drawn with fixed seeds, so that two
# pages of the same checkpoint are the same.
SAMPLING = Sampling(temperature=0.7, top_p=0.95, repetition_penalty=1.2)


def sample(workdirs: Sequence[epath.PathLike], prompts: Sequence[str]) -> list[list[str]]:
    """What each run's newest checkpoint says after each prompt: at most 64 tokens, in float32.

    Raises:
      UserError: a workdir without a whole checkpoint, or a checkpoint without a tokenizer.
    """
    found = []
    for workdir in workdirs:
        session = load(workdir, {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1}, "float32")
        tokenizer = session.need_tokenizer()
        ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
        texts = complete(session, ids, max_new_tokens=MAX_NEW_TOKENS, sampling=SAMPLING)
        found.append([text.text for text in texts])
    return found
