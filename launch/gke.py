"""Prints the JobSet that runs a config on TPU slices of a GKE cluster; launch/gke.sh hands it to kubectl.

    python launch/gke.py --config configs/lemur_7b_pretrain.py --workdir gs://BUCKET/run \\
        --topology v4-128 --image REGISTRY/lemur:TAG --name my-run

The cluster needs the JobSet controller (https://jobset.sigs.k8s.io) and a node pool of that topology; the image
needs this package with the extra "tpu" and the configs. Restarts: a host that is lost ends the others with
status 75 (cluster/watchdog.py) and JobSet starts all again; a config that is refused, status 2, fails the set.
With XPK, `xpk workload create --command` takes the same `lemur train` line and makes a manifest of its own.
"""

import argparse
import json
import math
import pathlib
import re
import shlex
import string
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lemur_jax.common.errors import UserError
from lemur_jax.config import load
from lemur_jax.parallel.mesh import mesh_shape
from lemur_jax.plan.topologies import Slice, find

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
SPOT = "cloud.google.com/gke-spot"
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: values of the node labels.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
CHIPS_PER_HOST = 4
# v5e and v6e are sold with up to eight chips in one host where the slice is that host.
ONE_HOST = {"v5e": 8, "v6e": 8}


def hosts_and_chips(slice_: Slice) -> tuple[int, int]:
    """Hosts of one slice, and chips of one host."""
    chips = math.prod(slice_.shape)
    if chips <= ONE_HOST.get(slice_.generation.name, CHIPS_PER_HOST):
        return 1, chips
    return chips // CHIPS_PER_HOST, CHIPS_PER_HOST


def jobset(
    config: Any,
    command: Sequence[str],
    *,
    name: str,
    image: str,
    topology: str,
    slices: int = 1,
    namespace: str = "default",
    service_account: str = "",
    secret: str = "",
    environment: Mapping[str, str] | None = None,
    spot: bool = False,
    max_restarts: int = 20,
) -> dict[str, Any]:
    """The manifest as a dictionary.

    Args:
      config: the run config; its mesh must fit the slices.
      command: what every host runs.
      name: of the set; a DNS label.
      image: container image.
      topology: a slice as it is rented, e.g. "v4-128".
      slices: how many of them.
      namespace: of the cluster.
      service_account: Kubernetes service account, with access to the bucket.
      secret: name of a Kubernetes secret whose keys become environment variables.
      environment: further variables of the run; never a secret.
      spot: on spot nodes.
      max_restarts: of the whole set, without counting evictions.

    Raises:
      UserError: no such slice, a mesh that does not fit it, or a name that Kubernetes refuses.
    """
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise UserError(f"--name is {name!r}: at most 40 lower case letters, digits and -, a letter first")
    slice_ = find(topology, slices)
    mesh_shape(config.mesh, slice_.devices_per_slice * slices)
    hosts, chips = hosts_and_chips(slice_)
    values = {
        "name": name,
        "namespace": namespace,
        "max_restarts": max_restarts,
        "slices": slices,
        "hosts": hosts,
        "accelerator": ACCELERATORS[slice_.generation.name],
        "shape": "x".join(map(str, slice_.shape)),
        "image": image,
        "command": list(command),
        "join": "1" if hosts * slices > 1 else "0",
        "chips": chips,
    }
    template = string.Template(TEMPLATE.read_text())
    manifest = yaml.safe_load(template.substitute({key: json.dumps(value) for key, value in values.items()}))
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    container["env"] += [{"name": name, "value": value} for name, value in (environment or {}).items()]
    if secret:
        container["envFrom"] = [{"secretRef": {"name": secret}}]
    if service_account:
        pod["serviceAccountName"] = service_account
    if spot:
        pod["nodeSelector"][SPOT] = "true"
        pod["tolerations"] = [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    return manifest


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="gke.py"
    )
    parser.add_argument("--config", required=True, help="path.py or path.py:arg")
    parser.add_argument("--workdir", required=True, help="gs://...")
    for option in ("--topology", "--image", "--name"):
        parser.add_argument(option, required=True)
    parser.add_argument("--verb", choices=["train", "doctor", "smoke"], default="train", help="of lemur")
    parser.add_argument(
        "--word", action="append", default=[], help="of `lemur smoke`; once for each, as --word=--checkpoint"
    )
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--service-account", default="")
    parser.add_argument("--secret", default="", help="name of a Kubernetes secret, never a value")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="may be given several times"
    )
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--max-restarts", type=int, default=20)
    options, overrides = parser.parse_known_args(arguments)
    run = ["--config", options.config, "--workdir", options.workdir, *overrides]
    command = ["lemur", options.verb, *(options.word if options.verb == "smoke" else run)]
    try:
        manifest = jobset(
            load(options.config, overrides),
            command,
            name=options.name,
            image=options.image,
            topology=options.topology,
            slices=options.slices,
            namespace=options.namespace,
            service_account=options.service_account,
            secret=options.secret,
            environment=_environment(options.env),
            spot=options.spot,
            max_restarts=options.max_restarts,
        )
    except UserError as error:
        print(f"gke.py: {error}", file=sys.stderr)
        return 2
    # JSON is YAML, and kubectl reads it.
    print(f"# {shlex.join(command)}\n{json.dumps(manifest, indent=2)}")
    return 0


def _environment(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", pair, re.DOTALL):
            raise UserError(f"--env is {pair!r}: it must be NAME=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


if __name__ == "__main__":
    sys.exit(main())
