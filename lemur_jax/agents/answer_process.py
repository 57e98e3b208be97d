"""Runs an answer and its tests in two processes, each in its own sandbox (`problems.check`).

    python answer_process.py answer IN OUT     runs answer.py, then the calls that the tests send
    python answer_process.py tests IN OUT      runs tests.py over the names that answer.py defines

IN and OUT are the descriptors of two pipes between them; a message is a line of JSON. Plain data (numbers, text,
bytes, lists, tuples, sets, dicts) pass by value; every other object stays with the answer, and the tests have a
`Remote` for it. So the answer can change the exit code of the tests only by the values that it returns.
"""

import builtins
import importlib
import json
import operator
import os
import sys
import traceback
import types

SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
ENDED = 3  # exit code of the tests if the answer's process has ended


def encode(value, keep):
    """A value for JSON; `keep(object)` encodes what is not plain data."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return [name, [encode(item, keep) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, keep), encode(item, keep)] for key, item in value.items()]]
    if isinstance(value, bytes):
        return ["bytes", value.decode("latin-1")]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    return keep(value)


def decode(value, find):
    """The inverse; `find(kind, content)` decodes what is not plain data."""
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind in SEQUENCES:
        return SEQUENCES[kind](decode(item, find) for item in content)
    if kind == "dict":
        return {decode(key, find): decode(item, find) for key, item in content}
    if kind == "bytes":
        return content.encode("latin-1")
    return complex(*content) if kind == "complex" else find(kind, content)


def run_answer(receive, send):
    """Runs answer.py, sends the names that it defines, then serves requests until the pipe ends."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # no text that an answer prints makes it fail
    objects = []

    def keep(value):
        if isinstance(value, types.ModuleType) and value.__name__ in sys.stdlib_module_names:
            return ["module", value.__name__]
        objects.append(value)
        return ["object", len(objects) - 1]

    def load():
        module = types.ModuleType("answer")
        sys.modules["answer"] = module
        with open("answer.py", encoding="utf-8", errors="surrogatepass") as file:
            exec(compile(file.read(), "answer.py", "exec"), module.__dict__)
        return {name: value for name, value in vars(module).items() if not name.startswith("__")}

    def handle(operation, index, arguments):
        positional, named = decode(arguments, lambda kind, content: objects[content])
        return operations[operation](objects[index], *positional, **named)

    operations = {"call": operator.call, "list": list, "attribute": getattr}
    work = load, ()
    while work:
        function, arguments = work
        try:
            reply = {"value": encode(function(*arguments), keep)}
        except Exception as error:
            trace = traceback.format_exception(
                type(error), error, error.__traceback__ and error.__traceback__.tb_next
            )
            reply = {"error": [type(error).__name__, str(error), "".join(trace)]}
        send(reply)
        request = receive()
        work = request and (handle, request)
    os._exit(0)


class Remote:
    """An object of the answer's process. It can be called, iterated, passed back and asked for attributes."""

    def __init__(self, ask, number):
        self.__dict__.update(remote_ask=ask, remote_number=number)

    def __call__(self, *positional, **named):
        return self.remote_ask("call", self, positional, named)

    def __iter__(self):
        return iter(self.remote_ask("list", self, (), {}))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.remote_ask("attribute", self, (name,), {})


def run_tests(receive, send):
    """Runs tests.py; exits with 0 if it reaches its end."""
    traces = {}

    def result():
        reply = receive()
        if reply is None:
            print("the answer's process has ended", file=sys.stderr, flush=True)
            os._exit(ENDED)
        if "error" in reply:
            name, message, trace = reply["error"]
            kind = getattr(builtins, name, None)
            builtin = isinstance(kind, type) and issubclass(kind, Exception)
            try:
                error = kind(message) if builtin else RuntimeError(f"{name}: {message}")
            except TypeError:
                error = RuntimeError(f"{name}: {message}")
            traces[id(error)] = error, trace
            raise error
        return decode(reply["value"], find)

    def find(kind, content):
        return importlib.import_module(content) if kind == "module" else Remote(ask, content)

    def keep(value):
        if isinstance(value, Remote):
            return ["object", value.remote_number]
        raise TypeError(f"the tests pass {value!r} to the answer, which is not plain data")

    def ask(operation, remote, positional, named):
        send([operation, remote.remote_number, encode([positional, named], keep)])
        return result()

    try:
        names = {name: value for name, value in result().items() if not hasattr(builtins, name)}
        with open("tests.py", encoding="utf-8", errors="surrogatepass") as file:
            exec(compile(file.read(), "tests.py", "exec"), {**names, "__name__": "tests"})
    except BaseException as error:
        _, trace = traces.get(id(error), (None, None))
        frames = error.__traceback__ and error.__traceback__.tb_next
        sys.stderr.write(trace or "".join(traceback.format_exception(type(error), error, frames)))
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def main(role, reading, writing):
    sys.set_int_max_str_digits(0)
    incoming = os.fdopen(int(reading), "rb")
    loads, dumps, write = json.loads, json.dumps, os.write  # the answer may rebind names of modules

    def receive():
        line = incoming.readline()
        return loads(line) if line.endswith(b"\n") else None

    def send(message):
        data = dumps(message).encode() + b"\n"
        while data:
            data = data[write(int(writing), data) :]

    (run_answer if role == "answer" else run_tests)(receive, send)


if __name__ == "__main__":
    main(*sys.argv[1:])
