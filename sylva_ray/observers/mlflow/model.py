"""The exported clients as one MLflow model, which is loaded with MLflow, timm and PEFT, without this package.

::

    model = mlflow.pyfunc.load_model("runs:/RUN_ID/model")
    logits = model.predict(images, params={"client": 3})       # images [N, 3, H, W] float32 in [0, 1]
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

PACKAGES = ("torch", "timm", "peft", "safetensors", "pillow", "numpy")
"""What the model needs besides MLflow."""

CODE = '''"""The clients of a run; `params` says which one answers."""

import runpy
from pathlib import Path

import mlflow
import torch


class Clients(mlflow.pyfunc.PythonModel):
    """Takes images [N, 3, H, W] in [0, 1] and returns logits [N, num_classes]."""

    def load_context(self, context):
        self.export = runpy.run_path(str(Path(context.artifacts["adapters"]) / "load.py"))
        self.models = {}

    def predict(self, context, model_input, params=None):
        client = f"client_{int((params or {}).get('client', 0)):03d}"
        if client not in self.models:
            self.models[client] = self.export["load"](client)
        with torch.no_grad():
            images = torch.as_tensor(model_input, dtype=torch.float32)
            return self.models[client](self.export["preprocess"](images)).numpy()


mlflow.models.set_model(Clients())
'''
"""The file that MLflow runs to load the model."""


def save_model(adapters: Path, num_classes: int, folder: Path) -> None:
    """Write a model in MLflow's format, with its signature.

    Args:
        adapters: the export, which the model contains.
        num_classes: of the data set.
        folder: which does not exist yet.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 3, -1, -1))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, num_classes))]),
        params=ParamSchema([ParamSpec("client", "long", 0)]),
    )
    with tempfile.TemporaryDirectory() as code:
        path = Path(code) / "clients.py"
        path.write_text(CODE)
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(path),
            artifacts={"adapters": str(adapters)},
            signature=signature,
            pip_requirements=[f"mlflow=={version('mlflow')}", *(f"{name}=={version(name)}" for name in PACKAGES)],
        )
