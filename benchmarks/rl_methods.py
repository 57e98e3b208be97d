"""Compares SFT on successful episodes, DPO on pairs of episodes, and RL in the lamp game, from one base model.

    lemur train --config configs/quickstart_rl.py:play --workdir quickstart/runs/play     # see docs/rl.md
    python benchmarks/rl_methods.py
    python benchmarks/rl_methods.py --controls 8 --updates 10

The base model plays as many episodes as RL samples. SFT trains on the successful ones, DPO on pairs of a successful
and a failed one of the same task. Each method makes `--updates` updates of `--rows` rows. Success is measured on 64
held-out tasks, greedy, and on 64 sampled episodes of training tasks. `--controls N` instead runs RL with shuffled
rewards from N seeds. Writes quickstart/traces, quickstart/stores and quickstart/runs/methods.
"""

import argparse
import copy
import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "configs"))

from lemur_jax.cluster import hosts
from lemur_jax.prepare.fields import Fields
from lemur_jax.prepare.tasks import add_files

TRACES = pathlib.Path("quickstart/traces")
SLOTS = 97  # of an episode, as in configs/quickstart_rl.py
GROUP = 8

if __name__ != "__main__":  # `config.data.modules` names this file
    add_files("lamp_wins", f"{TRACES}/wins.jsonl", Fields(messages=lambda row: row["messages"], id="id"))
    add_files("lamp_pairs", f"{TRACES}/pairs.jsonl", Fields(preferences=lambda row: row["pair"], id="id"))


def play(checkpoint, groups, *, held_out=False, temperature=1.0, size=GROUP, seed=1):
    """Groups of `size` episodes, one group per task."""
    from lemur_jax.infer.engine import Engine
    from lemur_jax.infer.sampling import Sampling
    from lemur_jax.infer.session import load
    from lemur_jax.rl import games
    from lemur_jax.rl.config import RlConfig
    from lemur_jax.rl.episodes import Episode, Player, seed_of

    session = load(checkpoint, {}, "float32")
    player = Player(RlConfig(max_new_tokens=4), session.need_tokenizer(), SLOTS)
    tasks = games.tasks("lamp")[held_out]
    engine = Engine(session, 64, 1 << 30, SLOTS)
    episodes = [
        Episode(environment=copy.copy(tasks[group % len(tasks)]), seed=seed_of(seed, group, number))
        for group in range(groups)
        for number in range(size)
    ]
    for start in range(0, len(episodes), 64):
        player.play(engine, episodes[start : start + 64], Sampling(temperature=temperature))
    return episodes, session.need_tokenizer()


def conversation(episode, tokenizer):
    """The messages of an episode, parsed from ChatML."""
    parts = tokenizer.decode(episode.ids, skip_special=False).split("<|im_start|>")[1:]
    said = [part.split("<|im_end|>")[0].partition("\n") for part in parts]
    return [{"role": role.strip(), "content": content.strip()} for role, _, content in said]


def write_traces(start, episodes):
    """Plays `episodes` episodes with the base model; writes successful ones, and pairs of one task, as JSON Lines."""
    played, tokenizer = play(start, episodes // GROUP)
    wins, pairs = [], []
    for group in range(0, len(played), GROUP):
        kinds = {True: [], False: []}
        for one in played[group : group + GROUP]:
            kinds[one.solved].append(conversation(one, tokenizer))
        wins += kinds[True]
        pairs += [
            {"chosen": won, "rejected": lost} for won, lost in zip(kinds[True], kinds[False], strict=False)
        ]
    TRACES.mkdir(parents=True, exist_ok=True)
    for name, key, rows in (("wins", "messages", wins), ("pairs", "pair", pairs)):
        lines = [json.dumps({"id": f"{name}/{number}", key: row}) for number, row in enumerate(rows)]
        (TRACES / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(played)} episodes of the base model: {len(wins)} successful, {len(pairs)} pairs", flush=True)


def tuning(start, options, method, learning_rate):
    """The config of SFT or DPO."""
    import quickstart_rl

    config = quickstart_rl.get_config("play")
    config.init.checkpoint = start
    config.seed = options.seed
    config.data.modules = ("rl_methods",)
    name = {"sft": "lamp_wins", "dpo": "lamp_pairs"}[method]
    config.data.sources = {name: {"share": 1.0, "packing": "fit", "max_epochs": 50.0}}
    config.train.steps, config.train.batch_rows = options.updates, options.rows
    config.optimizer.learning_rate = config.optimizer.final_learning_rate = learning_rate
    config.optimizer.warmup_steps, config.optimizer.weight_decay = 0, 0.0
    config.checkpoint.every_steps = 0
    if method == "dpo":
        config.preference.loss = "dpo"
        config.data.sequence_length = 192
        config.train.batch_rows //= 2  # a row holds a pair
    return config


def reinforcement(start, options, seed, shuffle):
    import quickstart_rl

    config = quickstart_rl.get_config()
    config.init.checkpoint = start
    config.seed = seed
    config.train.steps, config.train.batch_rows = options.updates, options.rows
    config.checkpoint.every_steps = 0
    config.rl.eval_every_steps = 0
    config.rl.shuffle_rewards = shuffle
    return config


def success(checkpoint):
    """Success in %: greedy on held-out tasks, sampled on training tasks."""
    greedy, _ = play(checkpoint, 64, held_out=True, temperature=0.0, size=1)
    sampled, _ = play(checkpoint, 64, size=1, seed=0)
    return [100 * statistics.mean(one.solved for one in played) for played in (greedy, sampled)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", default="quickstart/runs/play")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--controls", type=int, default=0)
    options = parser.parse_args()
    hosts.choose_platform()

    from lemur_jax.config import from_config_dict
    from lemur_jax.prepare.prepare import prepare
    from lemur_jax.rl.run import open_inputs
    from lemur_jax.train.loop import train

    def show(name, checkpoint):
        greedy, sampled = success(checkpoint)
        print(f"{name:<24}{greedy:8.0f}{sampled:8.0f}", flush=True)
        return greedy, sampled

    runs = pathlib.Path("quickstart/runs/methods")
    print(f"{'success in %':<24}{'greedy':>8}{'sampled':>8}")
    show("base model", options.start)
    if options.controls:
        found = []
        for seed in range(1, options.controls + 1):
            name = f"shuffled_{options.updates}_{seed}"
            config = from_config_dict(reinforcement(options.start, options, seed, True))
            train(config, runs / name, open_inputs=open_inputs)
            found.append(show(name, runs / name))
        for name, values in zip(("greedy", "sampled"), zip(*found, strict=True), strict=True):
            print(f"{name}: mean {statistics.mean(values):.0f}, deviation {statistics.pstdev(values):.0f}")
        return
    write_traces(options.start, options.updates * options.rows)
    for name, method, rate in (("sft", "sft", 5e-4), ("dpo", "dpo", 5e-5), ("dpo_5e-4", "dpo", 5e-4)):
        config = from_config_dict(tuning(options.start, options, method, rate))
        prepare(config, replace=True)
        train(config, runs / name)
        show(name, runs / name)
    config = from_config_dict(reinforcement(options.start, options, options.seed, False))
    train(config, runs / "rl", open_inputs=open_inputs)
    show("rl", runs / "rl")


if __name__ == "__main__":
    main()
