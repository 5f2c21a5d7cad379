"""The HTTP shim: model_api's dialects, and what `Client` and worker pools speak. No JAX in here."""

from lightning_jax.server.app import RunningServer, bind, create_app, serve

__all__ = ["RunningServer", "bind", "create_app", "serve"]
