"""An agent with a script."""


def scripted(*answers):
    """An agent that says these in turn, and keeps what it was shown."""
    seen = []
    left = iter(answers)

    def agent(messages):
        seen.append(list(messages))
        return next(left)

    agent.seen = seen
    return agent
