"""A cluster.yaml for AWS: what EC2 or `ray up` refuses after minutes, and what they take and nobody should ask for.

Ray's schema ends at ``node_config:``, which goes to EC2's RunInstances as it is. Here both are known by tables; AWS is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sylva_ray.core.errors import UserError

_TEXT, _TEXTS, _MAPPING, _MAPPINGS = "a text", "a list of texts, not empty", "a mapping", "a list of mappings"
_FLAG, _COUNT = "true or false", "a whole number"

_IS: dict[str, Callable[[Any], bool]] = {
    _TEXT: lambda value: isinstance(value, str) and value != "",
    _TEXTS: lambda value: isinstance(value, list) and value != [] and all(map(_IS[_TEXT], value)),
    _MAPPING: lambda value: isinstance(value, dict),
    _MAPPINGS: lambda value: isinstance(value, list) and all(map(_IS[_MAPPING], value)),
    _FLAG: lambda value: isinstance(value, bool),
    _COUNT: lambda value: isinstance(value, int) and not isinstance(value, bool),
}

_BY_SHAPE = {
    _TEXT: "AdditionalInfo ClientToken ImageId InstanceInitiatedShutdownBehavior InstanceType KernelId KeyName "
    "PrivateIpAddress RamdiskId SubnetId UserData",
    _TEXTS: "SecurityGroupIds SecurityGroups SubnetIds",
    _MAPPING: "CapacityReservationSpecification CpuOptions CreditSpecification EnclaveOptions HibernationOptions "
    "IamInstanceProfile InstanceMarketOptions LaunchTemplate MaintenanceOptions MetadataOptions Monitoring "
    "NetworkPerformanceOptions Placement PrivateDnsNameOptions",
    _MAPPINGS: "BlockDeviceMappings Ipv6Addresses LicenseSpecifications NetworkInterfaces TagSpecifications",
    _FLAG: "DisableApiStop DisableApiTermination EbsOptimized EnablePrimaryIpv6",
    _COUNT: "Ipv6AddressCount",
}
NODE_CONFIG = {key: shape for shape, keys in _BY_SHAPE.items() for key in keys.split()}
"""What EC2's RunInstances takes, and ``SubnetIds``, which is Ray's; and what each one is."""

_IMAGES_OF_RAY = """
us-east-1 us-east-2 us-west-1 us-west-2 ca-central-1 eu-central-1 eu-west-1 eu-west-2 eu-west-3 sa-east-1
ap-northeast-1 ap-northeast-2 ap-northeast-3 ap-southeast-1 ap-southeast-2
"""
IMAGES_OF_RAY = frozenset(_IMAGES_OF_RAY.split())
"""Regions where Ray 2.60 has an image of its own for a node type without ``ImageId``."""


def check_aws(config: Mapping[str, Any]) -> None:
    """``config`` as Ray reads it, its keys known.

    Raises:
        UserError: `ray up` would stop, or EC2 start nothing.
    """
    provider, auth = config["provider"], config["auth"]
    region = provider.get("region")
    if not region:
        raise UserError("provider.region", region, "is missing; e.g. us-west-2")
    for key in ("key_pair", "aws_credentials", "cloudwatch"):
        _check_shape(f"provider.{key}", provider.get(key, {}), _MAPPING)
    for name, node_type in config["available_node_types"].items():
        place, node = f"available_node_types.{name}.node_config", node_type["node_config"]
        for key, value in node.items():
            _check_shape(f"{place}.{key}", value, NODE_CONFIG[key])
        if "LaunchTemplate" in node:  # has what is not said here
            continue
        if "InstanceType" not in node:
            raise UserError(
                f"{place}.InstanceType", None, "is missing; e.g. g6.xlarge, or a LaunchTemplate that says it"
            )
        if "ImageId" not in node and region not in IMAGES_OF_RAY:
            raise UserError(f"{place}.ImageId", None, f"is missing, and Ray has no image of its own for {region}")
        if "ssh_private_key" in auth and not {"KeyName", "UserData"} & node.keys():
            raise UserError(
                f"{place}.KeyName", None, "is missing; auth.ssh_private_key is of which of EC2's key pairs?"
            )


def aws_findings(config: Mapping[str, Any]) -> Iterator[str]:
    """What would work, and should not be done; after `check_aws`."""
    for name, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        if not {"SecurityGroupIds", "NetworkInterfaces", "LaunchTemplate"} & node.keys():
            yield f"{name} names no SecurityGroupIds: Ray then makes a group that opens port 22 to the world"
        if not {"ImageId", "LaunchTemplate"} & node.keys():
            yield f"{name} names no ImageId: Ray then takes one of its own, as old as Ray's list of them"
    rules = config["provider"].get("security_group", {}).get("IpPermissions", [])
    if any("0.0.0.0/0" in str(rule) or "::/0" in str(rule) for rule in rules):
        yield "provider.security_group opens a port to the world"


def _check_shape(place: str, value: object, shape: str) -> None:
    if not _IS[shape](value):
        raise UserError(place, value, f"must be {shape}")
