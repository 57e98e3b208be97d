"""A taskset of the `verifiers` library."""

TASKSET = """
import verifiers.v1 as vf

__all__ = ["Sums"]


class Data(vf.TaskData):
    answer: str


class Sum(vf.Task[Data]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply)


class Sums(vf.Taskset[Sum, vf.TasksetConfig]):
    def load(self):
        for number in (1, 5):
            data = Data(prompt=f"{number} + 1?", system_prompt="Add.", answer=str(number + 1))
            yield Sum(data, self.config.task)
"""
