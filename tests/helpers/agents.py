"""An agent with a script, and one episode."""

from lemur_jax.agents.runner import run_episodes


def scripted(*answers):
    """An agent that says these in turn, and keeps what it was shown."""
    seen = []
    left = iter(answers)

    def agent(messages, stops=()):
        seen.append(list(messages))
        return next(left)

    agent.seen = seen
    return agent


def run_episode(environment, agent, *, max_turns):
    """One episode."""
    return run_episodes([environment], agent, max_turns=max_turns)[0]
