"""What agents may use where they run: tracing of tools and model calls, and rewards on the way (AIR).

What is set here before `Client.train` reaches the worker processes; set in the agent's own script, it holds there too.
Importing this costs nothing: OpenTelemetry and its instrumentors are imported in the workers, when they are asked for.
"""

from agent_lightning.runtime import air
from agent_lightning.runtime.config import set_config
from agent_lightning.runtime.tools import CodeResult, run_code, tool
from agent_lightning.runtime.tracing import auto_instrument

__all__ = ["CodeResult", "air", "auto_instrument", "run_code", "set_config", "tool"]
