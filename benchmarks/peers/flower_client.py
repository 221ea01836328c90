"""The Flower client. With ``PEERS_CACHED`` the model is built once per process; else in every call, as examples do."""

from __future__ import annotations

import os
from functools import cache

from client_work import Arrays, Client, build_client, train
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@cache
def cached_client() -> tuple[Client, Arrays]:
    """Return the model of this process, and the head with which every client begins."""
    made = build_client()
    return made, made.arrays(made.head)


@app.train()
def train_client(message: Message, context: Context) -> Message:
    """Train one client; its head stays in its context."""
    own, head = cached_client() if os.environ.get("PEERS_CACHED") else (build_client(), None)
    config = message.content["config"]
    own.load(own.adapters, message.content["arrays"].to_numpy_ndarrays())
    if "head" in context.state:
        head = context.state["head"].to_numpy_ndarrays()
    if head is not None:
        own.load(own.head, head)
    number = int(context.node_config["partition-id"])
    train(own, number, int(config["images"]), int(config["steps"]))
    context.state["head"] = ArrayRecord(own.arrays(own.head))
    metrics = MetricRecord({"num-examples": int(config["images"])})
    arrays = ArrayRecord(own.arrays(own.adapters))
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
