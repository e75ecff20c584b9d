"""Every mistake a user can make, as one tree; the words say what is wrong, then what to do.

    ChiplogError
    ├── SettingsError         chiplog.toml is missing, unreadable or wrong
    ├── OutsideRootsError     a path outside the folders that chiplog may touch
    ├── NotFoundError         a data set, model, study, plan, run or job that is not there
    ├── PlanError             a plan that cannot be run as it stands
    ├── RenderError           a folder that cannot be written as asked
    ├── EngineError           a job that cannot be submitted, followed or cancelled
    ├── RecordError           records or a ledger that cannot be read or written
    ├── StudyError            a study's own command failed
    └── ConfirmationNeeded    not a mistake: the answer to this question must come first

A fault of ours is an assert, never one of these.
"""


class ChiplogError(Exception):
    """A mistake that the reader of the message can mend."""


class SettingsError(ChiplogError):
    """`chiplog.toml` is missing, unreadable or wrong."""


class OutsideRootsError(ChiplogError):
    """A path outside the folders that `chiplog.toml` allows."""


class NotFoundError(ChiplogError):
    """Something that was named is not there; the message lists what is."""


class PlanError(ChiplogError):
    """A plan that cannot be run as it stands."""


class RenderError(ChiplogError):
    """An experiment folder that cannot be written as asked."""


class EngineError(ChiplogError):
    """A job that cannot be submitted, followed or cancelled."""


class RecordError(ChiplogError):
    """Records or a ledger that cannot be read or written."""


class StudyError(ChiplogError):
    """A study's own command failed; the message holds its last words."""


class ConfirmationNeeded(ChiplogError):
    """Raised by a tool called without `confirm`; the message is the question to put to the user."""


def in_words(error: Exception) -> str:
    """What a person should read: our own words, or what the system said of which file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}. Mend that (space, permissions) and try again"
    if isinstance(error, UnicodeDecodeError):
        return f"a file is not UTF-8 text ({error.reason} at byte {error.start}): restore or remove it"
    return str(error)
