"""MINT's verdicts on answers (Wang et al. 2023, "MINT", its public code), quirks included, to be comparable."""

import ast
import operator
import re
import sys
from collections.abc import Callable
from typing import Any

from lemur_jax.agents.problems import check

_NUMBER = r"[-+]?(?:[\d,]*\.*\d+)"


def reasoning(reference: Any, answer: str) -> bool:
    """GSM8K, MATH and HotpotQA: within 5% where both are numbers, else whether the reference is part of the answer."""
    reference, answer = str(reference).strip().lower(), answer.lower().strip()
    try:
        expected, found = float(reference), float(answer)
    except ValueError:
        return reference in answer
    # Never true for a negative reference, in the recorded runs too.
    return abs(expected - found) <= 0.05 * expected


def choice(reference: str, answer: str, prompt: str) -> bool:
    """MMLU: the letter is part of the answer, or the text of the right option is and that of no wrong one."""
    answer, reference = answer.lower().strip(), reference.strip().lower()
    if "a)" in answer or "a )" in answer:
        answer = "a"

    def holds(expected: str) -> bool:
        if expected.isdecimal() and answer.isdecimal():
            return abs(float(expected) - float(answer)) <= 0.05 * float(expected)
        return expected in answer

    if holds(reference):
        return True
    options = {}
    for option in prompt.split("Options: ")[-1].split(" , "):
        letter, _, text = option.strip("[]' ").partition(")")
        options[letter.lower().strip()] = text.partition(")")[0].lower().strip(".").strip()
    right, wrong = options[reference], list(options.values())
    for option in wrong:  # MINT removes while it iterates, which skips the next option
        if option in right:
            wrong.remove(option)
    return not any(holds(one) or one in answer for one in wrong) and (holds(right) or right in answer)


def theorem(reference: Any, answer: str, kind: str) -> bool:
    """TheoremQA, with answers read as in its own evaluation; for options only the letter (as in the recorded runs)."""
    text = _normalize(answer)
    if kind in ("option", "Option"):
        return text in (reference, f"({reference})")
    value = evaluate(text)
    if kind == "bool":
        return value is not None and value == reference
    if kind in ("integer", "float"):
        return _equal(value, reference)
    numbers = isinstance(value, list) and all(isinstance(item, int | float) for item in value)
    return numbers and len(value) == len(reference) and all(map(_equal, sorted(value), sorted(reference)))


def _equal(value: Any, expected: float) -> bool:
    # A whole number may be too large for a float, which `math.isfinite` would want.
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        return False
    if isinstance(expected, float):
        return abs(value - expected) <= 0.04 * abs(expected)
    return round(value) == expected


def _normalize(text: str) -> str:
    """The number, list or truth value in an answer, as a Python expression."""
    for sign in "=≈":
        if sign in text:
            text = text.split(sign)[-1].strip()
    text = re.sub("[`$°]", "", text)
    if text in ("true", "yes", "false", "no"):
        text = str(text in ("true", "yes"))
    if "True" in text or "False" in text:
        text = str("True" in text)
    if "approximately" in text:
        text = text.replace("approximately", "").strip()
    text = text.split(" or ")[0]
    for prefix, suffix in (("", " [^0-9 ]+"), ("[^0-9 ]+ ", ""), ("", r"[^\d]{1,2}")):
        if match := re.match(f"{prefix}({_NUMBER}){suffix}$", text):
            text = match[1]
    if match := re.match(r"[^-+\d]{1,2}((?:[\d,]*\.*\d+))$", text):
        text = match[1]
    text = text.replace(" x ", "*").replace(" × ", "*")
    if re.match(r"^[-+]?(\d{1,3}(,\d{3})*|(\d+))(\.\d+)?$", text):
        text = text.replace(",", "")
    return text or "0"


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.BitXor: operator.xor,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def evaluate(text: str) -> Any:
    """The value of literals and arithmetic (MINT calls `eval`); None for anything else."""

    def number(node: ast.AST) -> Any:
        # Arithmetic takes numbers alone: "'a' * 9999999999" would fill the memory of the evaluation.
        result = value(node)
        if not isinstance(result, int | float | complex):
            raise TypeError(result)
        return result

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.List() | ast.Tuple() | ast.Set():
                items = [value(item) for item in node.elts]
                return sorted(set(items)) if isinstance(node, ast.Set) else items
            case ast.UnaryOp():
                return _OPERATORS[type(node.op)](number(node.operand))
            case ast.BinOp(op=ast.Pow()):
                return float(number(node.left)) ** float(number(node.right))
            case ast.BinOp():
                return _OPERATORS[type(node.op)](number(node.left), number(node.right))
        raise ValueError(ast.dump(node))

    try:
        result = value(ast.parse(text.lstrip(" \t"), mode="eval").body)
    except (ValueError, TypeError, KeyError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        return None
    return result.real if isinstance(result, complex) else result


def code(reference: str, answer: str) -> bool:
    """HumanEval and MBPP: the tests pass."""
    return check(answer, reference)[0] == "passed"
