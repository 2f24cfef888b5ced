"""A reward of one's own: 1.0 for a completion of exactly as many words as the row asks for."""


def reward(prompt: str, completion: str, row: dict) -> float:
    distance = abs(len(completion.split()) - row["num_words"])
    return max(0.0, 1.0 - distance / row["num_words"])
