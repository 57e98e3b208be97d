"""Sample generations for the report, from the newest checkpoint of each run."""

from collections.abc import Sequence

from etils import epath

from lemur_jax.checkpoint.reading import read_metadata, steps_in
from lemur_jax.infer.complete import complete
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import load
from lemur_jax.parallel.mesh import parse_mesh
from lemur_jax.report.runs import read_runs
from lemur_jax.text.chat_template import encode_chat

MAX_NEW_TOKENS = 96
# Greedy decoding of a small model repeats line breaks. The seeds are fixed: two pages of a checkpoint are the same.
SAMPLING = Sampling(temperature=0.7, top_p=0.95, repetition_penalty=1.2)


def sample(
    workdirs: Sequence[epath.PathLike], prompts: Sequence[str], questions: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Continues prompts by at most 96 tokens, and answers questions in the chat template, with each newest checkpoint.

    Returns by stage the texts for the prompts and questions, computed in float32. The first stage, `start`, is the
    model that the first run started from, if it is still there: at the step that the run has recorded, else at
    the newest. Raises UserError if a workdir has no complete checkpoint, or one
    has no tokenizer or no chat template.
    """
    runs = read_runs(workdirs)
    stages = {run.name: (run.workdir, None) for run in runs}
    config = runs[0].config
    if (start := config.get("init.checkpoint")) and epath.Path(start).exists():
        origin = read_metadata(runs[0].workdir).get("origins", {}).get("init.checkpoint", {})
        step = origin.get("step")
        if step is None or step in steps_in(start)[1]:
            stages = {"start": (start, step)} | stages
    answers = {}
    for name, (checkpoint, step) in stages.items():
        session = load(checkpoint, parse_mesh(""), "float32", step)
        tokenizer = session.need_tokenizer()
        ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
        conversations = [[{"role": "user", "content": question}] for question in questions]
        ids += [encode_chat(tokenizer, messages, add_generation_prompt=True)[0] for messages in conversations]
        completions = complete(session, ids, max_new_tokens=MAX_NEW_TOKENS, sampling=SAMPLING)
        answers[name] = [completion.text for completion in completions]
    return answers
