"""Checks of settings: one line that names the key, the value and the cure."""


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition`."""
    if not condition:
        raise ValueError(message)


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    require(value in choices, f"{key} = {value!r} is not one of: {', '.join(choices)}")


def require_positive(prefix: str, **values: float) -> None:
    """Raise ValueError unless every value is greater than 0."""
    for name, value in values.items():
        require(value > 0, f"{prefix}.{name} = {value} must be greater than 0")
