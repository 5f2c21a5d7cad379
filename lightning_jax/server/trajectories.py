"""A job's trajectories over HTTP, a page at a time."""

from typing import Literal

import orjson
from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from lightning_jax.policies import Policies
from lightning_jax.server import wire
from lightning_jax.store import Store
from lightning_jax.store.trajectories import Filter, trajectory

_PAGE_BYTES = 4 * 2**20  # a page ends behind the trajectory that fills it

router = APIRouter()


@router.get("/api/jobs/{job_id}/trajectories")
async def get_trajectories(
    request: Request,
    job_id: str,
    step: int | None = Query(None, ge=0, le=2**63 - 1),
    mode: Literal["train", "evaluate"] | None = None,
    after: int = Query(0, ge=0, le=2**63 - 1),
    limit: int | None = Query(None, ge=1),
) -> Response:
    """Rollouts that have ended, oldest first, from the rollout id `after` on; `next` is the next page's `after`."""
    store: Store = request.app.state.store
    store.job_status(job_id)
    policies: Policies = request.app.state.policies
    body = await run_in_threadpool(_page, store, policies, Filter(job_id, step, mode), after, limit)
    return Response(body, media_type="application/json")


def _page(store: Store, policies: Policies, which: Filter, after: int, limit: int | None) -> bytes:
    tokenizers = {name: policy.tokenizer for name, policy in policies.items()}
    items, size, following = [], 0, None
    for job_id, record in store.ended_rollouts(which, after):
        item = wire.dumps(trajectory(job_id, record, tokenizers))
        items.append(item)
        size += len(item)
        if size >= _PAGE_BYTES or len(items) == limit:
            following = record.rollout_id
            break
    return b'{"trajectories":[%s],"next":%s}' % (b",".join(items), orjson.dumps(following))
