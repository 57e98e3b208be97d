"""Prints the JobSet that runs a config on TPU slices of a GKE cluster.

    python launch/gke.py --config configs/lemur_7b_pretrain.py --workdir gs://BUCKET/run \\
        --topology v4-128 --image REGISTRY/lemur:TAG --name my-run | kubectl apply -f -

The cluster needs the JobSet controller (https://jobset.sigs.k8s.io) and a node pool of that topology; the image
needs this package with the extra "tpu" and the configs. Restarts: a host that is lost ends the others with
status 75 (parallel/liveness.py) and JobSet starts all again; a config that is refused, status 2, fails the set.
With XPK, `xpk workload create --command` takes the same `lemur train` line and makes a manifest of its own.
"""

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from lemur_jax.common.config import load
from lemur_jax.common.errors import UserError
from lemur_jax.parallel.mesh import mesh_shape
from lemur_jax.plan.topologies import Slice, find

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
    container: dict[str, Any] = {
        "name": "lemur",
        "image": image,
        "command": list(command),
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"limits": {"google.com/tpu": chips}, "requests": {"google.com/tpu": chips}},
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    # An evicted run has saved and ends with 75: to Kubernetes, 0 would be a finished job.
    container["env"] = [{"name": "LEMUR_RELAUNCH", "value": "1"}]
    if hosts > 1 or slices > 1:
        container["env"].append({"name": "LEMUR_JOIN", "value": "1"})
    if secret:
        container["envFrom"] = [{"secretRef": {"name": secret}}]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[slice_.generation.name],
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, slice_.shape)),
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        # The pod's SIGTERM lets a run save before it is evicted.
        "terminationGracePeriodSeconds": 120,
        "nodeSelector": selector,
        "containers": [container],
    }
    if service_account:
        pod["serviceAccountName"] = service_account
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": namespace,
            # One slice, one node pool.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": max_restarts,
                "rules": [
                    {"name": "refused", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": slices,
                    "template": {
                        "spec": {
                            "parallelism": hosts,
                            "completions": hosts,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "podFailurePolicy": {
                                "rules": [
                                    {
                                        "action": "FailJob",
                                        "onExitCodes": {
                                            "containerName": "lemur",
                                            "operator": "In",
                                            "values": [2],
                                        },
                                    }
                                ]
                            },
                            "template": {"spec": pod},
                        }
                    },
                }
            ],
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="gke.py"
    )
    parser.add_argument("--config", required=True, help="path.py or path.py:arg")
    parser.add_argument("--workdir", required=True, help="gs://...")
    for option in ("--topology", "--image", "--name"):
        parser.add_argument(option, required=True)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--service-account", default="")
    parser.add_argument("--secret", default="", help="name of a Kubernetes secret, never a value")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--max-restarts", type=int, default=20)
    options, overrides = parser.parse_known_args(arguments)
    command = ["lemur", "train", "--config", options.config, "--workdir", options.workdir, *overrides]
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
            spot=options.spot,
            max_restarts=options.max_restarts,
        )
    except UserError as error:
        print(f"gke.py: {error}", file=sys.stderr)
        return 2
    print(f"# {shlex.join(command)}")
    # JSON is YAML, and kubectl reads it.
    print(json.dumps(manifest, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
