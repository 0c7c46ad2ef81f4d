"""What a worker is started with: made from the settings by name, one argument on its command line."""

from __future__ import annotations

import msgspec
import pytest

from proxyd.control.config.settings import Settings
from proxyd.relay.ipc.options import Options

NO_SETTINGS = {"records", "max_relays"}


def test_each_option_has_the_value_of_the_setting_of_its_name() -> None:
    settings = Settings(
        tcp_idle_timeout=1.5, tcp_splice=False, udp_timeout=2.5, sctp_max_message=4096, workers=3
    )
    expected = Options(
        tcp_idle_timeout=1.5,
        tcp_splice=False,
        udp_timeout=2.5,
        sctp_max_message=4096,
        workers=3,
        records=True,
    )
    assert Options.of(settings, records=True) == expected


def test_an_option_is_a_setting_or_known_as_none() -> None:
    assert set(Options.__struct_fields__) - set(Settings.__struct_fields__) == NO_SETTINGS


def test_defaults_are_those_of_the_settings() -> None:
    assert Options.of(Settings()) == Options()


def test_a_timeout_that_is_the_default_is_still_one_that_was_given() -> None:
    assert Options.of(Settings(udp_timeout=60.0)) != Options.of(Settings())


def test_one_argument_carries_all_of_them() -> None:
    options = Options(tcp_idle_timeout=0.25, tcp_splice=False, records=True, max_relays=7)
    assert Options.decode(options.encode()) == options
    assert msgspec.json.decode(options.encode())["max_relays"] == 7


@pytest.mark.parametrize("text", ["", "{", "[]", '{"udp_timeout": "long"}'])
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Options.decode(text)
