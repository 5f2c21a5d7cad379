"""Arguments win over variables, variables over defaults, and a bad one is named."""

import pytest

from agent_lightning import InvalidConfigError, settings


def test_server_url(monkeypatch):
    with pytest.raises(InvalidConfigError, match="AGENT_LIGHTNING_SERVER_URL"):
        settings.server_url()
    monkeypatch.setenv("AGENT_LIGHTNING_SERVER_URL", "http://from-variable:1/")
    assert settings.server_url() == "http://from-variable:1"
    assert settings.server_url("https://argument") == "https://argument"
    with pytest.raises(InvalidConfigError, match="server_url='localhost:8000'"):
        settings.server_url("localhost:8000")
    monkeypatch.setenv("AGENT_LIGHTNING_SERVER_URL", "nonsense")
    with pytest.raises(InvalidConfigError, match="AGENT_LIGHTNING_SERVER_URL='nonsense'"):
        settings.server_url()


def test_api_key(monkeypatch):
    assert settings.api_key() is None
    monkeypatch.setenv("AGENT_LIGHTNING_API_KEY", "variable")
    assert settings.api_key() == "variable"
    assert settings.api_key("argument") == "argument"


def test_max_retries(monkeypatch):
    assert settings.max_retries() == 3
    monkeypatch.setenv("LIGHTNING_MAX_RETRIES", "7")
    assert settings.max_retries() == 7
    assert settings.max_retries(0) == 0
    monkeypatch.setenv("LIGHTNING_MAX_RETRIES", "many")
    with pytest.raises(InvalidConfigError, match="LIGHTNING_MAX_RETRIES='many'"):
        settings.max_retries()
    with pytest.raises(InvalidConfigError, match="max_retries=-1"):
        settings.max_retries(-1)
