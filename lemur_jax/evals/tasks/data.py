"""Questions, prompts and verdicts of the task files in this directory.

They follow the paper's own evaluation code (OpenLemur/Lemur, `xchat/eval`) unless noted. Data come from
`DIR/NAME/CONFIG/SPLIT*.parquet` (a downloaded repository of the hub) or else from the hub. The examples of BBH and
GSM8K are those of the installed harness.
"""

import collections
import io
import itertools
import pathlib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from etils import epath

from lemur_jax.common.errors import UserError

# Name -> repository of the hub.
REPOSITORIES = {"mmlu": "cais/mmlu", "bbh": "SaylorTwift/bbh", "gsm8k": "openai/gsm8k"}
FIELDS = {
    "mmlu": ("question", "subject", "choices", "answer"),
    "bbh": ("input", "target"),
    "gsm8k": ("question", "answer"),
}
LETTERS = "ABCD"

Document = dict[str, Any]


def mmlu(data: str = "", **_: Any) -> dict[str, Any]:
    """Questions of all subjects, each after the first 5 development questions of its subject."""
    shots = collections.defaultdict(list)
    for row in rows("mmlu", "all", "dev", data):
        shots[row["subject"]].append(f"{_question(row)} {LETTERS[row['answer']]}\n\n")
    documents = []
    for row in rows("mmlu", "all", "test", data):
        subject = row["subject"].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        prompt = head + "".join(shots[row["subject"]][:5]) + _question(row)
        documents.append({"prompt": prompt, "answer": row["answer"], "subject": row["subject"]})
    return _test_split(documents, "subject")


def _question(row: Mapping[str, Any]) -> str:
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}{choices}\nAnswer:"


def bbh(data: str = "", **_: Any) -> dict[str, Any]:
    """Questions of all tasks, each after its task's description and 3 examples."""
    documents = []
    for path in sorted((_harness_tasks() / "bbh/fewshot").glob("*.yaml")):
        settings = yaml.safe_load(path.read_text())
        if "dataset_name" not in settings:
            continue
        name, shots = settings["dataset_name"], settings["fewshot_config"]["samples"]
        head = settings["description"].strip() + "\n\n"
        head += "".join(f"Q: {shot['input'].strip()}\nA: {shot['target'].strip()}\n\n" for shot in shots[:3])
        for row in rows("bbh", name, "test", data):
            prompt = f"{head}Q: {row['input'].strip()}\nA:"
            documents.append({"prompt": prompt, "target": row["target"].strip(), "task": name})
    return _test_split(documents, "task")


def bbh_result(doc: Document, results: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Whether the answer is the target, with the task's name for `mean_over_tasks`."""
    return {"exact_match": (doc["task"], short_answer(results[0]) == short_answer(doc["target"]))}


def short_answer(text: str) -> str:
    """The text before the first full stop, or the first option letter in it, in lower case.

    The paper's code also removes punctuation, and so accepts any right number of brackets in Dyck languages.
    """
    answer = text.strip().partition("\n")[0].partition(".")[0].strip().lower()
    option = re.search(r"\(\w\)", answer)
    return option.group() if option and not re.search(r"[][]", answer) else answer


def mean_over_tasks(items: Iterable[tuple[str, bool]]) -> float:
    """The mean over tasks of the share of right answers."""
    by_task = collections.defaultdict(list)
    for task, correct in items:
        by_task[task].append(correct)
    return statistics.fmean(statistics.fmean(results) for results in by_task.values())


def gsm8k(data: str = "", **_: Any) -> dict[str, Any]:
    """Test questions, each after 8 worked ones."""
    settings = yaml.safe_load((_harness_tasks() / "gsm8k/gsm8k-cot.yaml").read_text())
    shots = settings["fewshot_config"]["samples"][:8]
    head = "Answer the following questions.\n\n"
    for shot in shots:
        answer = shot["target"].replace("The answer is", "So the answer is")
        head += f"Question: {shot['question']}\nAnswer: {answer}\n\n"
    documents = []
    for row in rows("gsm8k", "main", "test", data):
        target = row["answer"].rpartition("####")[2].strip()
        documents.append({"prompt": f"{head}Question: {row['question'].strip()}\nAnswer:", "target": target})
    return _test_split(documents)


def gsm8k_result(doc: Document, results: Sequence[str]) -> dict[str, bool]:
    """Whether the last number of the answer is the target."""
    return {"exact_match": last_number(results[0]) == last_number(doc["target"])}


def last_number(text: str) -> float | None:
    """The last number in a text: 1200.5 of "$1,200.50."."""
    matches = re.findall(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?", text)
    return float(matches[-1].replace(",", "")) if matches else None


def rows(name: str, config: str, split: str, data: str = "") -> list[Document]:
    """The documents of a split, from `data/NAME/CONFIG` or from the hub.

    Raises:
      UserError: they are in neither, or a file is damaged or another one.
    """
    repository = REPOSITORIES[name]
    paths = sorted((epath.Path(data) / name / config).glob(f"{split}*.parquet")) if data else []
    if paths:
        return [row for path in paths for row in _read(path, FIELDS[name])]
    import datasets

    try:
        return list(datasets.load_dataset(repository, config, split=split))
    except Exception as error:  # of many classes, by what the network and the hub say
        raise UserError(
            f"{name} needs {data or 'DIR'}/{name}/{config}/{split}*.parquet, or the hub ({type(error).__name__}):"
            f" where there is a network, hf download {repository} --repo-type dataset --local-dir DIR/{name};"
            " copy DIR here and name it with --data DIR"
        ) from error


def _read(path: epath.Path, fields: Sequence[str]) -> list[Document]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(path.read_bytes()))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is no whole Parquet file ({reason}): download it again, with git lfs or hf"
        ) from error
    if lacking := [field for field in fields if field not in table.column_names]:
        raise UserError(f"{path} lacks {', '.join(lacking)}; it has {', '.join(table.column_names)}")
    return table.to_pylist()


def _test_split(documents: list[Document], field: str = "") -> dict[str, Any]:
    """The documents as the harness takes them, interleaved by a field, so that a limit takes some of each value."""
    import datasets

    counters: Any = collections.defaultdict(itertools.count)
    interleaved = sorted(documents, key=lambda document: next(counters[document.get(field)]))
    return {"test": datasets.Dataset.from_list(interleaved)}


def _harness_tasks() -> pathlib.Path:
    import lm_eval

    return pathlib.Path(lm_eval.__file__).parent / "tasks"
