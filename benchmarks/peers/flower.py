"""The work of a round in Flower, by its simulation engine on Ray, in an environment of its own (peers.py makes it).

    python benchmarks/peers/flower.py CLIENTS IMAGES STEPS ROUNDS MARKS   # peers.py does

With ``PEERS_CACHED=1`` the client keeps a model per process.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

from client_work import build_client, mark, parse_arguments
from flower_client import app as client_app
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

GIVEN = parse_arguments(__doc__)

server_app = ServerApp()


class MarkedFedAvg(FedAvg):
    """FedAvg that notes when its rounds begin, and fails if a client does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.marks: list[dict[str, Any]] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See `FedAvg.configure_train`."""
        self.marks.append(mark())
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """See `FedAvg.aggregate_train`."""
        answers = list(replies)
        assert len(answers) == GIVEN.num_clients, "a client did not answer"
        assert not any(answer.has_error() for answer in answers), "a client failed"
        return super().aggregate_train(server_round, answers)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    del context
    own = build_client()
    strategy = MarkedFedAvg(
        fraction_evaluate=0.0, min_train_nodes=GIVEN.num_clients, min_available_nodes=GIVEN.num_clients
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(own.arrays(own.adapters)),
        train_config=ConfigRecord({"images": GIVEN.num_images, "steps": GIVEN.steps}),
        num_rounds=GIVEN.rounds,
    )
    GIVEN.marks.write_text(json.dumps(strategy.marks))


if __name__ == "__main__":
    ray = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    backend = {"client_resources": {"num_cpus": 1.0, "num_gpus": 0.0}, "init_args": ray}
    run_simulation(server_app, client_app, num_supernodes=GIVEN.num_clients, backend_config=backend)
