"""Does an answer decline? Phrases near its start, as one of the two refusal detectors.

The phrases are our own list of how assistants decline. A phrase counts only at the start of a clause in the
first 300 characters, so that a quotation further down does not. The learned head of the classifier is the other
detector; an answer is a refusal when either says so.
"""

import re

from services.safety.embedded.features import normalise

OPENING_CHARACTERS = 300

_VERBS = (
    "help|assist|aid|provide|do (?:that|this|so)|answer|fulfil|fulfill|comply|create|write|generate|give|offer|support"
    "|share|engage|discuss|participate|satisfy|recommend|tell|teach|explain|show|encourage|condone|promote|suggest"
    "|advise|complete|produce|respond|say|make|describe|endorse|facilitate|accommodate|carry out|be part|take part"
    "|in good conscience|ethically|legally|and will not|and won't|or will not|or won't|directly|grant|proceed|continue"
    "|instruct|list|draft|process|speculate|access|disclose|reveal|contribute|agree|cooperate|joke|role-?play|pretend"
)
_CANNOT = (
    "(?:can't|cannot|can not|won't|will not|could not|couldn't|would not|wouldn't|must not|should not|shouldn't|may not"
    "|will never|would never|can never)"
)
_IT_IS = "(?:it is|it's|it would be|that is|that's|this is|that would be|this would be)"
# What a refusing clause says.
_CORE = (
    "(?:i|we) (?:just |simply |really |also |therefore |still |unfortunately )*"
    rf"{_CANNOT}(?: and {_CANNOT})?,?(?: (?:really|possibly|personally|knowingly|ever|actually|simply|just))*"
    rf" (?:{_VERBS})\b",
    r"(?:i am|i'm|we are|we're) (?:\w+ )?(?:unable to|not able to|not going to|not allowed to|not permitted to"
    "|not programmed to|not designed to|not here to|not capable of|not comfortable|not in a position to"
    "|not authorized to|prohibited from|obliged to decline|not willing to|unwilling to)",
    "i (?:do not|don't|would not|wouldn't) (?:feel|be) (?:comfortable|right|able)",
    "i (?:do not|don't) (?:provide|support|condone|encourage|promote|assist|engage|help|give|offer|endorse|recommend"
    "|create|write|advise|have (?:access|the ability|permission|personal))",
    r"i(?:'ll| will)? (?:(?:must|have to|need to|am going to have to|would like to|respectfully|politely|kindly) )*"
    r"(?:decline|refuse|reject|say no)\b",
    "i (?:strongly |would strongly |must strongly |would )(?:advise|urge|recommend|discourage|condemn|caution) "
    "(?:you )?(?:not|against|anyone against|any)",
    rf"{_IT_IS} (?:\w+ ){{0,2}}?(?:not (?:\w+ )?(?:appropriate|ethical|acceptable|within my|something (?:that )?i"
    "|a good idea|right|okay|ok)|inappropriate|unethical|against my|wrong of me|beyond my|outside my)",
    r"(?:this|that|your|the) (?:\w+ )?(?:request|question|prompt|topic|content|query|task) (?:goes against|violates"
    "|is against|is not|isn't|is inappropriate|is harmful|is illegal|involves|contains|asks for|promotes|appears to"
    "|seems to)",
    "(?:there is|there's) no (?:safe|ethical|legal|acceptable|appropriate|justifiable) (?:way|reason)",
    r"(?:sorry|my apologies|apologies)[,.!]* (?:but|i can't|i cannot|that's not|that is not|no\b)",
    r"i'm sorry[,.]* (?:but )?(?:i|we|that|this)\b(?! (?:feel|felt|hear|heard|happened|you))",
    "i (?:sincerely |deeply |must )?apologi[sz]e[,.]* (?:but|for (?:the inconvenience|any|not))",
    r"no[,.!] (?:i|you should(?: not|n't)|it is not|it's not|that is not|that's not|absolutely not|we)\b",
    r"absolutely not\b",
    r"(?:nobody|no one) should\b",
    "my (?:purpose|guidelines|programming|policies|principles|values|training) (?:is|are|do|does|prevent|prohibit"
    "|forbid)",
    r"as (?:an? )?(?:\w+ ){0,3}(?:ai|assistant|language model)[^.!?]{0,80}?(?:can't|cannot|can not|unable|not able"
    "|not appropriate|do not|don't|must|won't|will not|not programmed|not capable|not designed)",
)
# A clause starts a sentence, or follows a comma or a word such as "but"; matching clauses and not whole sentences
# keeps the pattern linear in the text's length.
_CLAUSE = (
    r"(?:^|[.!?\n,;:)*\"]\s*|\b(?:but|that|and|so|however|unfortunately|sadly|regrettably|sorry|afraid|therefore) )"
)
_REFUSAL = re.compile(rf"{_CLAUSE}['\"(*]*(?:{'|'.join(_CORE)})")


def has_refusal_phrase(response: str) -> bool:
    """Whether a clause that begins in the first 300 characters declines."""
    opening = normalise(response[: 2 * OPENING_CHARACTERS]).strip()
    found = _REFUSAL.search(opening)
    return found is not None and found.start() < OPENING_CHARACTERS
