import multiprocessing
import signal
import subprocess
import sys

from openclip_ext.processes import worker_pool

WORKING = """
import os, signal, sys
from openclip_ext.processes import worker_pool
if __name__ == "__main__":
    with worker_pool(2) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(signal.pause)
        os.kill(os.getpid(), int(sys.argv[1]))
"""


def test_processes_of_a_pool_end_with_one_that_is_killed(tmp_path):
    """They hold the pipe of its output open as long as they live."""
    script = tmp_path / "working.py"
    script.write_text(WORKING)
    killed = subprocess.run([sys.executable, script, str(int(signal.SIGKILL))], stdout=subprocess.PIPE, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert int(killed.stdout) > 0


def test_a_pool_goes_where_nothing_can_be_forked(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with worker_pool(1) as pool:
        assert pool.submit(abs, -3).result(timeout=60) == 3
        assert pool._mp_context.get_start_method() == "spawn"
