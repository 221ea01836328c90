"""Check what a cluster.yaml for AWS asks of EC2, without AWS.

Ray's schema ends at ``node_config:``, whose keys go to EC2's RunInstances as they are. A mistake there is reported by
EC2 after minutes, if at all. botocore's model of EC2 would do the same check, but botocore is installed with neither
Ray nor this package. The table below is taken from that model, which a test confirms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sylva_ray.core.errors import UserError
from sylva_ray.provisioning.launcher_config import LauncherConfig, NodeTypeSection

_STRING, _STRINGS, _MAPPING, _MAPPINGS = "a string", "a list of strings, not empty", "a mapping", "a list of mappings"
_FLAG, _COUNT = "true or false", "a whole number"

_MATCHES: dict[str, Callable[[object], bool]] = {
    _STRING: lambda value: isinstance(value, str) and value != "",
    _STRINGS: lambda value: isinstance(value, list) and value != [] and all(map(_MATCHES[_STRING], value)),
    _MAPPING: lambda value: isinstance(value, dict),
    _MAPPINGS: lambda value: isinstance(value, list) and all(map(_MATCHES[_MAPPING], value)),
    _FLAG: lambda value: isinstance(value, bool),
    _COUNT: lambda value: isinstance(value, int) and not isinstance(value, bool),
}

_KEYS_BY_TYPE = {
    _STRING: "AdditionalInfo ClientToken ImageId InstanceInitiatedShutdownBehavior InstanceType KernelId KeyName "
    "PrivateIpAddress RamdiskId SubnetId UserData",
    _STRINGS: "SecurityGroupIds SecurityGroups SubnetIds",
    _MAPPING: "CapacityReservationSpecification CpuOptions CreditSpecification EnclaveOptions HibernationOptions "
    "IamInstanceProfile InstanceMarketOptions LaunchTemplate MaintenanceOptions MetadataOptions Monitoring "
    "NetworkPerformanceOptions Placement PrivateDnsNameOptions",
    _MAPPINGS: "BlockDeviceMappings Ipv6Addresses LicenseSpecifications NetworkInterfaces TagSpecifications",
    _FLAG: "DisableApiStop DisableApiTermination EbsOptimized EnablePrimaryIpv6",
    _COUNT: "Ipv6AddressCount",
}
NODE_CONFIG = {key: kind for kind, keys in _KEYS_BY_TYPE.items() for key in keys.split()}
"""The arguments of EC2's RunInstances and the type of each; ``SubnetIds`` is Ray's."""

_REGIONS = """
us-east-1 us-east-2 us-west-1 us-west-2 ca-central-1 eu-central-1 eu-west-1 eu-west-2 eu-west-3 sa-east-1
ap-northeast-1 ap-northeast-2 ap-northeast-3 ap-southeast-1 ap-southeast-2
"""
REGIONS_WITH_IMAGE = frozenset(_REGIONS.split())
"""Regions for which Ray 2.60 knows an image, which a node type without ``ImageId`` then runs."""


def check_aws(config: LauncherConfig) -> None:
    """Refuse what stops `ray up`, or leaves EC2 without an instance to start.

    Args:
        config: the file with Ray's defaults, its keys known to be allowed.

    Raises:
        UserError: names the dotted key.
    """
    region = config.provider.get("region")
    if not region:
        raise UserError("provider.region", region, "is missing; e.g. us-west-2")
    for key in ("key_pair", "aws_credentials", "cloudwatch"):
        _check_type(f"provider.{key}", config.provider.get(key, {}), _MAPPING)
    for name, node_type in config.available_node_types.items():
        _check_node(
            f"available_node_types.{name}.node_config", node_type, str(region), "ssh_private_key" in config.auth
        )


def _check_node(place: str, node_type: NodeTypeSection, region: str, has_private_key: bool) -> None:
    node = node_type.node_config
    for key, value in node.items():
        _check_type(f"{place}.{key}", value, NODE_CONFIG[key])
    if "LaunchTemplate" in node:  # which may hold what is missing here
        return
    if "InstanceType" not in node:
        raise UserError(f"{place}.InstanceType", None, "is missing; e.g. g6.xlarge, or a LaunchTemplate that has one")
    if "ImageId" not in node and region not in REGIONS_WITH_IMAGE:
        raise UserError(f"{place}.ImageId", None, f"is missing, and Ray has no default image for {region}")
    if has_private_key and not {"KeyName", "UserData"} & node.keys():
        fix = "is missing; name the EC2 key pair that auth.ssh_private_key belongs to"
        raise UserError(f"{place}.KeyName", None, fix)


def aws_warnings(config: LauncherConfig) -> Iterator[str]:
    """Yield what AWS accepts but a reader should change; `check_aws` has passed."""
    for name, node_type in config.available_node_types.items():
        node = node_type.node_config
        if not {"SecurityGroupIds", "NetworkInterfaces", "LaunchTemplate"} & node.keys():
            yield f"{name} has no SecurityGroupIds: Ray then creates a group that opens port 22 to the world"
        if not {"ImageId", "LaunchTemplate"} & node.keys():
            yield f"{name} has no ImageId: Ray then takes its default image, which is as old as this version of Ray"
    if any(world in str(config.provider.get("security_group")) for world in ("0.0.0.0/0", "::/0")):
        yield "provider.security_group opens a port to the world"


def _check_type(place: str, value: object, kind: str) -> None:
    if not _MATCHES[kind](value):
        raise UserError(place, value, f"must be {kind}")
