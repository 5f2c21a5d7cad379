"""Which of the models a request means, and in which role it asks."""

import re
from collections.abc import Mapping

import ml_collections

from lightning_jax.policies import Policies
from lightning_jax.server.contract import ApiError
from lightning_jax.server.generate import Generator
from lightning_jax.store import Attempt, Store

_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,40}")


class Generators:
    """The models' generators."""

    def __init__(self, policies: Policies, store: Store, sampler_config: ml_collections.ConfigDict):
        self._policies, self._store = policies, store
        self._generators = {name: Generator(policy, store, sampler_config) for name, policy in policies.items()}

    def attempt(self, token: str | None) -> Attempt | None:
        """The attempt a rollout URL belongs to; None for the server's root. Raises ApiError (401)."""
        if token is None:
            return None
        attempt = self._store.attempt_by_token(token)
        if attempt is None:
            raise ApiError("this rollout URL is unknown, or its attempt has ended", status=401, kind="authentication")
        return attempt

    def choose(self, path_params: Mapping[str, str], model: str | None = None) -> Generator:
        """The generator that a request means, in the role it asks for.

        The URL's role decides: a model's name, or its number from 1 on. Without one the request's model name does, if
        it is one of several models'; any other name means the first. A single model takes every role, and keeps it in
        its records.

        Args:
            path_params: the route's; with "role" where the URL has one.
            model: the request's field.

        Raises:
            ApiError: 404, there is no model of that role.
        """
        names, role = list(self._generators), path_params.get("role")
        if len(names) == 1:
            if role is not None and not _ROLE.fullmatch(role):
                raise ApiError(
                    f"{role!r} is not a role: letters, digits, '_', '.' and '-'", status=404, kind="not_found"
                )
            return self._generators[names[0]].in_role(role or "1")
        if role is None:
            name = model if model in names else names[0]
        elif (policy := self._policies.find(role)) is not None:
            name = policy.name
        else:
            raise ApiError(
                f"no model {role!r}: there are 1 to {len(names)}, or {', '.join(names)}", status=404, kind="not_found"
            )
        return self._generators[name].in_role(name)
