"""The reference of the settings: one table, made from the declarations in `vflow_server.settings`."""

from __future__ import annotations

from vflow_server.settings import CONFIG_VARIABLE, ENVIRONMENT_PREFIX, options


def page() -> str:
    """The Markdown page."""
    lines = [
        "# Settings",
        "",
        "Each setting of `vflow serve` has one name in three spellings: the flag `--kv-budget`, the environment "
        f"variable `{ENVIRONMENT_PREFIX}KV_BUDGET`, and the key `kv_budget` of a TOML file. `--config FILE` or "
        f"`{CONFIG_VARIABLE}` names that file. A flag wins over a variable, and a variable over the file.",
        "",
        "Sizes are written as `512MiB` or `2GiB`, times as `90s`, `15m` or `1h`. A setting marked with (\\*) gives "
        "every tenant at least one place, even when the others have taken them all.",
        "",
        "| Flag | Value | Default | Meaning |",
        "|---|---|---|---|",
    ]
    for name, option in options().items():
        default = "unset" if option.shown is None else f"`{option.shown}`"
        meaning = option.help.replace("*", r"\*").replace("|", r"\|")
        value = option.metavar.replace("|", r"\|")
        flag = f"--{name.replace('_', '-')}"
        lines.append(f'| <span id="{name}"></span>`{flag}` | {value} | {default} | {meaning} |')
    return "\n".join(lines) + "\n"
