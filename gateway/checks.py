"""What is put before the classifier: every text of the conversation, cut into windows of bounded length."""

from gateway.chat import Chat, has_words
from services.contracts.verdicts import ClassifyItem


def windows(text: str, size: int) -> list[str]:
    """Cut a text into windows of ``size`` characters; each repeats the last quarter of the one before.

    A classifier may read only so much and drop the rest in silence; what stands on a border is seen whole all the same.
    """
    if len(text) <= size:
        return [text] if text.strip() else []
    step = size - size // 4
    return [text[start : start + size] for start in range(0, len(text) - size // 4, step)]


def prompt_items(chat: Chat, size: int) -> list[ClassifyItem]:
    """All that the client sent: each message by itself, then all that is not an answer as one text.

    Each by itself, so that a long harmless conversation does not hide one harmful message, and a polite last turn
    does not hide an earlier one; as one text, so that nothing hides in pieces. An assistant turn is judged as the
    answer to what stands before it. A text without words is only judged with the others: alone it has no verdict.
    """
    items: list[ClassifyItem] = []
    asked: list[str] = []
    before = ""
    for message in chat.messages:
        text = message.content or ""
        if not text.strip():
            continue
        if not has_words(text):
            asked.append(text)
        elif message.role == "assistant" and before:
            items += [ClassifyItem(prompt=before, response=part) for part in windows(text, size)]
        else:
            items += [ClassifyItem(prompt=part) for part in windows(text, size)]
            asked.append(text)
            before = text[-size:]
    if len(asked) > 1:
        items += [ClassifyItem(prompt=part) for part in windows("\n".join(asked), size)]
    return items


def response_items(chat: Chat, answer: str, size: int) -> list[ClassifyItem]:
    """An answer, or a part of one, with the prompt that it answers; no items when there is no text in it."""
    return [ClassifyItem(prompt=chat.prompt[-size:], response=part) for part in windows(answer, size)]
