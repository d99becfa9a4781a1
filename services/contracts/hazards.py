"""The hazard taxonomy: MLCommons AILuminate S1..S14, as Llama Guard 3 numbers it."""

from enum import StrEnum


class HazardCategory(StrEnum):
    """A kind of harm, by its MLCommons id; ``category.title`` is the readable name."""

    VIOLENT_CRIMES = "S1"
    NON_VIOLENT_CRIMES = "S2"
    SEX_RELATED_CRIMES = "S3"
    CHILD_SEXUAL_EXPLOITATION = "S4"
    DEFAMATION = "S5"
    SPECIALIZED_ADVICE = "S6"
    PRIVACY = "S7"
    INTELLECTUAL_PROPERTY = "S8"
    INDISCRIMINATE_WEAPONS = "S9"
    HATE = "S10"
    SUICIDE_AND_SELF_HARM = "S11"
    SEXUAL_CONTENT = "S12"
    ELECTIONS = "S13"
    CODE_INTERPRETER_ABUSE = "S14"

    @property
    def readable(self) -> str:
        """The name for people, for example ``Violent crimes``."""
        return self.name.replace("_", " ").capitalize()
