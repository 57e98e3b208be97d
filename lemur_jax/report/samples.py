"""Sample generations for the report, from the newest checkpoint of each run."""

from collections.abc import Sequence

from etils import epath

from lemur_jax.infer.complete import complete
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import load

MAX_NEW_TOKENS = 64
# Greedy decoding of a small model repeats line breaks. The seeds are fixed: two pages of a checkpoint are the same.
SAMPLING = Sampling(temperature=0.7, top_p=0.95, repetition_penalty=1.2)


def sample(workdirs: Sequence[epath.PathLike], prompts: Sequence[str]) -> list[list[str]]:
    """Continues each prompt by at most 64 tokens with the newest checkpoint of each run, in float32.

    Returns:
      The texts: of each run, for each prompt.

    Raises:
      UserError: a workdir has no complete checkpoint, or a checkpoint has no tokenizer.
    """
    answers = []
    for workdir in workdirs:
        session = load(workdir, {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1}, "float32")
        tokenizer = session.need_tokenizer()
        ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
        texts = complete(session, ids, max_new_tokens=MAX_NEW_TOKENS, sampling=SAMPLING)
        answers.append([text.text for text in texts])
    return answers
