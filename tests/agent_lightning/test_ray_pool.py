"""Workers on a Ray cluster: here one of several nodes on this machine, one of which is killed."""

import sys
import threading
import time

import pytest

from agent_lightning import Client
from agent_lightning.exceptions import InvalidConfigError
from agent_lightning.ray_pool import RayPool, divide
from tests.agent_lightning.conftest import ask, wait_until, written_pids


def test_workers_are_divided_by_cpus():
    assert divide(list(range(6)), [4.0, 2.0]) == [[0, 1, 3, 4], [2, 5]]
    assert divide([7], [0.0, 1.0]) == [[], [7]]
    assert divide([0, 1], [0.0, 0.0]) == [[0], [1]]


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **small})
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_node_that_dies_loses_nothing_but_its_attempts(cluster, served, tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr("lightning_jax.store.rollouts.POOL_SILENCE_S", 3.0)
    doomed = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    cluster.wait_for_nodes()
    folder = tmp_path / "workers"
    folder.mkdir()

    def agent(resource, task):
        import os
        import time

        held = os.path.join(folder, f"{resource.worker_id}")
        open(held, "w").close()
        time.sleep(0.3)
        return float(task.x)

    tasks = [{"x": x} for x in range(40)]
    job_id, rollout_ids = served.open_job(tasks, max_attempts=3)
    pool = RayPool(cluster.address, served.url, job_id, agent, 4)
    seen = []
    with served.ending(job_id, rollout_ids):
        thread = threading.Thread(target=lambda: seen.append(pool.run()))
        thread.start()
        wait_until(lambda: sorted(written_pids(folder)) == [0, 1, 2, 3], 60)  # both nodes are at work
        cluster.remove_node(doomed, allow_graceful=False)
        died = time.monotonic()
        wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1, 30)
        thread.join(120)
    assert seen == ["succeeded"]
    records = served.store.finished(rollout_ids)
    assert [record.reward for record in records] == [float(x) for x in range(40)]
    attempts = [record.attempt for record in records]
    assert set(attempts) == {1, 2} and attempts.count(2) <= 2, "what ran on the node, and nothing else, is run again"
    assert time.monotonic() - died < 90


def test_an_agent_that_cannot_be_loaded_ends_it_with_the_reason(cluster, served, tmp_path):
    from agent_lightning import TrainingError

    script = tmp_path / "broken.py"
    script.write_text("import no_such_package_of_mine\n")
    job_id, _ = served.open_job([{"x": 1}])
    with pytest.raises(TrainingError, match="No module named 'no_such_package_of_mine'"):
        RayPool(cluster.address, served.url, job_id, str(script), 1).run()


def test_a_node_where_no_pool_can_be_made_ends_it_with_the_reason(cluster, served):
    """As where another version of the package is installed, or none."""
    from agent_lightning import TrainingError

    job_id, _ = served.open_job([{"x": 1}])
    pool = RayPool(cluster.address, served.url, job_id, ask, 1, setting_of_another_version=1)
    give_up = threading.Timer(60, pool.stop)
    give_up.start()
    with pytest.raises(TrainingError, match="(?s)could not be started on a node: .*'setting_of_another_version'"):
        pool.run()
    give_up.cancel()


def test_a_client_runs_its_agents_there(cluster, client):
    there = Client(client.server_url, ray_address=cluster.address)
    result = there.evaluate(ask, data_id="sums", nworkers=-1)
    assert len(result.rewards) == 1 and result.failures == 0


def test_variables_of_the_clients_hold_there(cluster, client, monkeypatch):
    def agent(resource, task):
        from agent_lightning.runtime import config

        return float(config.air_enabled()) + config.max_retries()

    monkeypatch.setenv("LIGHTNING_ENABLE_AIR", "true")  # after the cluster's processes began
    monkeypatch.setenv("LIGHTNING_MAX_RETRIES", "7")
    there = Client(client.server_url, ray_address=cluster.address)
    assert there.evaluate(agent, data_id="sums", nworkers=1).mean == 8.0


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # what Python itself keeps for a package that cannot be imported
    with pytest.raises(InvalidConfigError, match=r"pip install 'lightning-jax\[ray\]'"):
        RayPool("auto", "http://127.0.0.1:1", "job", lambda resource, task: 1, 1)
