"""Benchmarks whose answers are run: HumanEval and MBPP.

Sampling is that of the paper's own evaluation code (OpenLemur/Lemur, `xchat/eval`); answers end where
bigcode-evaluation-harness ends them, so verdicts on the same text are the same.
"""

from collections.abc import Callable, Sequence

from lemur_jax.agents.environments import before_stops
from lemur_jax.agents.problems import Problem, Verdict, judge
from lemur_jax.infer.complete import complete
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import Session
from lemur_jax.text.chat_template import encode_chat

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```", "<file_sep>")
# The first two close the paper's examples. The prompt's newline is part of the answer: before `_MBPP_BEGINNINGS` it is
# no stop.
MBPP_STOPS: tuple[str, ...] = ("[DONE]", "[/PYTHON]", "\nassert", "\nprint", "\n<|/", "\n```")
_MBPP_BEGINNINGS = ("\nclass", "\nif", '\n"""')
HUMANEVAL_SAMPLING = Sampling(temperature=0.2, top_p=0.95)
MBPP_SAMPLING = Sampling(temperature=0.0)


def cut_mbpp(answer: str) -> str:
    """The answer without the prompt's newline, up to the first stop."""
    return before_stops(answer.removeprefix("\n"), (*MBPP_STOPS, *_MBPP_BEGINNINGS))


def solve(
    session: Session,
    problems: Sequence[Problem],
    *,
    stops: Sequence[str],
    sampling: Sampling,
    cut: Callable[[str], str] = str,
    chat: bool = False,
    max_new_tokens: int = 512,
) -> list[Verdict]:
    """Generates one answer to each problem and judges it; no bos in front of the prompts.

    Args:
      stops: strings that end generation, and the answer before them.
      cut: maps an answer to the code that is run.
      chat: ask in the model's chat template.

    Raises:
      UserError: as `complete`, or `chat` without a chat template.
    """
    tokenizer = session.need_tokenizer()
    limit = min(max_new_tokens, session.model.max_position_embeddings // 2)

    def encode(problem: Problem) -> list[int]:
        if not chat:
            return tokenizer.encode(problem.prompt)
        chat_ids, _ = encode_chat(tokenizer, problem.turns, add_generation_prompt=True)
        return [*chat_ids, *tokenizer.encode(problem.opening, prefix=False)]

    prompts = [encode(problem) for problem in problems]
    completions = complete(session, prompts, max_new_tokens=limit, stops=stops, sampling=sampling)
    return judge(problems, [cut(completion.text) for completion in completions])
