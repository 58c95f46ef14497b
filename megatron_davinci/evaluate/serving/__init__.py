"""Our own models behind the part of OpenAI's API that asks for text."""
