"""Every error that Lightning JAX raises on purpose; all derive from `AgentLightningError`."""


class AgentLightningError(Exception):
    """Base of all errors of this project.

    Attributes:
        hint: what the reader can do about it; part of the printed text when given.
    """

    def __init__(self, message: str, *, hint: str | None = None):
        self.hint = hint
        super().__init__(f"{message}\n  hint: {hint}" if hint else message)


class ServerConnectionError(AgentLightningError):
    """The server could not be reached, or it stopped answering."""


class KeyRefusedError(ServerConnectionError):
    """The server does not accept the API key, or wants one and got none. Trying again does not help."""


class TrainingError(AgentLightningError):
    """A training or evaluation job failed."""


class DataUploadError(AgentLightningError):
    """A dataset file is not valid, or could not be stored. Nothing of it is kept."""


class InvalidConfigError(AgentLightningError, ValueError):
    """A setting, flag, variable, model path or agent script is wrong."""


class RemoteError(AgentLightningError):
    """What went wrong in the server, where it is none of the errors above; the cause of the one that is raised."""
