"""Measures how long a save blocks training, compared with the device-to-host copy and the whole write.

    python benchmarks/checkpoint.py --preset llama2_7b --layers 1 --directory /tmp/checkpoint

Saves a fresh training state `--rounds` times as `lemur train` does, and prints medians: "copy" is the copy of the state
to the host, "digests" the digests of all leaves with the check for finite values, "save" the time until `save`
returns. Waiting that continues after `save` delays the next update, so "blocked" is `save` and the next update, less an
update without a save. Starting a save takes some hundredths of a second, most of the time for a small state
(`--preset tiny`).
"""

import argparse
import shutil
import statistics
import time

from lemur_jax.cluster import hosts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--layers", type=int, default=0, help="default: the preset's")
    parser.add_argument("--directory", required=True, help="for the checkpoints; emptied before and after")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    hosts.choose_platform()

    import jax
    import numpy as np

    from lemur_jax.checkpoint.digest import leaf_digests
    from lemur_jax.checkpoint.manager import Checkpoints
    from lemur_jax.checkpoint.metadata import make_metadata
    from lemur_jax.config import RunConfig, replace
    from lemur_jax.models import decoder
    from lemur_jax.models.presets import preset
    from lemur_jax.parallel.mesh import make_mesh
    from lemur_jax.train.state import shardings_of, start
    from lemur_jax.train.step import build

    layers = {"num_hidden_layers": options.layers} if options.layers else {}
    model = preset(options.preset, **layers)
    # Nothing is trained, but the config is checked as a whole.
    config = replace(
        RunConfig(model=model), {"data.sequence_length": min(2048, model.max_position_embeddings)}
    )
    program = build(config, make_mesh(config.mesh), 1)
    init = jax.jit(
        lambda key: decoder.init_params(program.model, key), out_shardings=shardings_of(program.state.params)
    )
    state = start(init(jax.random.key(0)), program.optimizer, program.state)
    update = jax.jit(lambda trees: jax.tree.map(lambda leaf: leaf + leaf, trees), donate_argnums=0)
    trees = update({"params": state.params, "optimizer": state.optimizer})
    del state
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
    metadata = make_metadata(model=program.model.to_dict(), tokenizer_files={})
    seconds: dict[str, list[float]] = {}

    def timed(name: str, run) -> None:
        started = time.perf_counter()
        run()
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    shutil.rmtree(options.directory, ignore_errors=True)

    def updated() -> None:
        nonlocal trees
        trees = jax.block_until_ready(update(trees))

    with Checkpoints(options.directory, keep=1) as checkpoints:
        for step in range(options.rounds + 1):
            timed("copy", lambda: jax.tree.map(lambda leaf: np.array(leaf, copy=True), trees))
            timed("digests", lambda: leaf_digests(trees, "trees"))
            timed("update", updated)
            timed("save", lambda step=step: checkpoints.save(step, **trees, metadata=metadata))
            timed("update after", updated)
            timed("written after", checkpoints.wait)
    blocked = zip(seconds["save"], seconds["update after"], seconds["update"], strict=True)
    seconds["blocked"] = [save + after - alone for save, after, alone in blocked]
    print(f"{options.preset}: {size / 1e9:.2f} GB of state, {jax.device_count()} device(s)")
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first compiles
    for name, value in medians.items():
        print(f"{name:14} {value:6.2f} s")
    print(f"blocked / copy {medians['blocked'] / medians['copy']:6.2f}")
    shutil.rmtree(options.directory)


if __name__ == "__main__":
    main()
