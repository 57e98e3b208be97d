"""Plays one game of ALFWorld in JSON lines: commands on stdin, [feedback, won] on stdout after each and at the start.

python alfworld_process.py GAME
"""

import json
import os
import sys


def main(game):
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the planner prints
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos

    world = textworld.start(game, textworld.EnvInfos(won=True), wrappers=[AlfredDemangler(), AlfredInfos])
    state = world.reset()
    while True:
        print(json.dumps([state.feedback.strip(), bool(state.won)]), file=results, flush=True)
        if not (line := sys.stdin.readline()):
            break
        state, _, _ = world.step(json.loads(line))


if __name__ == "__main__":
    main(sys.argv[1])
