"""Runtime API: instrumentation, settings and rewards on the way, as a script of the user's has them."""

from agent_lightning import Client

AGENT = '''
from agent_lightning.runtime import auto_instrument, set_config

# Enable automatic trajectory collection
auto_instrument(
    trace_llm_calls=True,      # Trace all LLM calls
    trace_tool_calls=True,     # Trace tool executions
    trace_context=True         # Capture full context
)

# Configure runtime
set_config({
    "air_enabled": True,       # Automatic Intermediate Rewarding
    "max_retries": 3,         # Retry failed calls
    "timeout": 60             # Call timeout
})

from agent_lightning.runtime import air

# Define custom AIR rules
@air.on_tool_success
def reward_tool_success(tool_name, output):
    """Assign +0.3 reward when tool succeeds."""
    return 0.3

@air.on_tool_failure
def penalize_tool_failure(tool_name, error):
    """Assign -0.2 penalty when tool fails."""
    return -0.2

@air.on_code_execution
def reward_code_exec(code, result, exit_code):
    """Custom reward based on code execution."""
    if exit_code == 0:
        return 0.5
    else:
        return -0.1
'''

USER = """
from agent_lightning.runtime import run_code, tool
from openai import OpenAI

@tool
def add(a, b):
    return a + b

@tool
def broken():
    raise ValueError("no")

def my_agent(resource, task):
    client = OpenAI()
    def ask(text):
        messages = [{"role": "user", "content": text}]
        client.chat.completions.create(model=resource.model_name, messages=messages, max_tokens=2)
    ask("1+1=")
    add(1, 2)
    ask("1+2=")
    try:
        broken()
    except ValueError:
        pass
    ask("1+3=")
    run_code("print(1)")
    run_code("raise SystemExit(3)")
    return 1.0
"""


def test_rewards_on_the_way(project):
    (project / "my_agent.py").write_text(AGENT + USER)
    with Client() as client:
        client.upload_data("train.jsonl")
        result = client.train("my_agent.py", nworkers=2, batch_size=8)
        trajectories = list(client.trajectories(result, mode="train"))
    assert len(trajectories) == 16  # 8 tasks x group 2
    for trajectory in trajectories:
        rewards = [round(transition.reward, 4) for transition in trajectory.transitions]
        assert rewards == [0.3, -0.2, 1.4]  # 0.5 and -0.1 for the code, and what the agent returned
        assert round(trajectory.total_reward, 4) == 1.5
    assert abs(result.final_reward - 1.5) < 1e-6
