"""Our models in lm-evaluation-harness, as its model `lemur`.

Tokenization, windows, truncation and stops are those of the harness's `hf` model, so both give the same numbers for
one checkpoint. One default differs: no bos in front (the paper's protocol) without `add_bos=True`.
Importing this module registers the model.
"""

import functools
import logging
from typing import Any

from lemur_jax.cluster import hosts
from lemur_jax.common.errors import UserError
from lemur_jax.infer.complete import complete
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.score import BATCH_TOKENS, score
from lemur_jax.infer.session import Session, load
from lemur_jax.parallel.mesh import parse_mesh
from lemur_jax.text.chat_template import chat_template as template_of
from lemur_jax.text.chat_template import render_chat

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise UserError(f"the evaluation harness is missing ({error}): pip install 'lemur_jax[eval]'") from error

logger = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@functools.cache  # once, not for each question
def _warn_left_out(reason: str) -> None:
    logger.warning("the system turn of a task is left out: %s", reason)


@register_model("lemur")
class LemurLM(TemplateLM):
    """A session behind the harness's interface.

    Args:
      session: the model; None: opens the checkpoint.
      checkpoint: opened with `mesh`, `dtype`, `step` and `weights` of `options` as `lemur generate` takes them.
      add_bos: begin every text with the tokenizer's prefix.
      batch_tokens: tokens of a batch, padding and room for generation included.
      seed: of sampling.
      options: others that the harness passes (batch_size, device and the like) are ignored.
    """

    def __init__(
        self,
        session: Session | None = None,
        *,
        checkpoint: str = "",
        add_bos: bool = False,
        batch_tokens: int = BATCH_TOKENS,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__()
        if session is None:
            hosts.keep_programs()
            mesh, dtype = parse_mesh(options.get("mesh", "")), options.get("dtype", "float32")
            weights = options.get("weights", "float")
            session = load(checkpoint, mesh, dtype, options.get("step"), weights=weights)
        self.session = session
        self.tokenizer = self.session.need_tokenizer()
        self.add_bos = add_bos
        self.batch_tokens = int(batch_tokens)
        self.seed = seed

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.session.model.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return f"lemur-{self.tokenizer.digest[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids of a text in which control tokens may be spelled out, as the harness's templates do."""
        if self.add_bos and add_special_tokens is not False:
            return self.tokenizer.encode_prompt(string, control_tokens=True)
        return self.tokenizer.encode_with_control_tokens(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
        """[(texts, context ids, continuation ids)] to [(log-likelihood in nats, is greedy)]."""
        pairs = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"an answer of a task has {len(continuation)} tokens, the model's max_position_embeddings are"
                    f" {self.max_length}: leave the task out"
                )
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            split = len(tokens) - len(continuation)
            pairs.append((tokens[:split], tokens[split:]))
        scores = score(self.session, pairs, batch_tokens=self.batch_tokens)
        results = [(item.total, all(item.greedy)) for item in scores]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, cut into windows of the model's length."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            (text,) = request.args
            pieces = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(utils.make_disjoint_window, pieces):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string, without it."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        answers: dict[int, str] = {}
        for indices in groups.values():
            options = normalize_gen_kwargs(
                requests[indices[0]].args[1]
            )  # without do_sample, temperature is 0
            if (limit := options["max_gen_toks"]) >= self.max_length:
                raise UserError(
                    f"a task wants {limit} new tokens, the model's max_position_embeddings are {self.max_length}:"
                    " give --max-new-tokens"
                )
            if (beams := options.get("num_beams") or 1) != 1:
                raise UserError(
                    f"a task wants num_beams {beams}: answers are sampled or greedy, leave the task out"
                )
            stops = [stop for stop in options["until"] if stop]
            given: dict[str, Any] = {name: options[name] for name in _SAMPLING if options.get(name)}
            completions = complete(
                self.session,
                [self.tok_encode(requests[index].args[0]) or [self.prefix_token_id] for index in indices],
                max_new_tokens=limit,
                stops=stops,
                sampling=Sampling(**given, seed=self.seed),
                seeds=indices,
                batch_tokens=self.batch_tokens,
            )
            for index, completion in zip(indices, completions, strict=True):
                # Decoded without its prompt, as the `hf` model does.
                answer = self.tokenizer.decode(completion.content, skip_special=True)
                answers[index] = postprocess_generated_text(answer, stops, None)
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return [answers[index] for index in range(len(requests))]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return template_of(self.tokenizer) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without a generation prompt its last turn is left open."""
        try:
            text = render_chat(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)
        except UserError as error:
            others = [turn for turn in chat_history if turn["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            # As the `hf` model: Gemma's template, among others, refuses the turn that a task's description becomes.
            _warn_left_out(str(error))
            return self.apply_chat_template(others, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]
