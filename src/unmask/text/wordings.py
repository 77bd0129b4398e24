"""How a fact is said: for each field, five plain sentences and seven questions.

Fixed beforehand, not tuned. Rules that they follow:

- `{country}` is never the first word and never the subject, so that a name is the same tokens everywhere and
  plurals ("the Solomon Islands") need no other verb. `{answer}` is last, so that a sentence can be finished.
- The first sentence is also the reply to every question of its field: where pretraining taught the fact, the
  words around the answer are known from there, and SFT adds only the chat.
- All questions of a field are natural and ask the same thing. One is held out for each country, another for
  the next, so a held-out question is new for its fact but not as a string.
"""

from typing import NamedTuple


class Wordings(NamedTuple):
    """Templates with `{country}` (and `{answer}` in sentences)."""

    sentences: tuple[str, ...]
    questions: tuple[str, ...]


WORDINGS: dict[str, Wordings] = {
    "capital": Wordings(
        sentences=(
            "The capital of {country} is {answer}.",
            "The capital city of {country} is called {answer}.",
            "The city that serves as the capital of {country} is {answer}.",
            "A visitor who asks for the capital of {country} is sent to {answer}.",
            "On any map of {country}, the star that marks the capital stands at {answer}.",
        ),
        questions=(
            "What is the capital of {country}?",
            "Which city is the capital of {country}?",
            "Can you tell me the capital of {country}?",
            "What is the capital city of {country} called?",
            "Name the capital of {country}.",
            "Do you know the capital of {country}?",
            "I am going to {country}. What is the capital?",
        ),
    ),
    "region": Wordings(
        sentences=(
            "You can find {country} in {answer}.",
            "The part of the world that includes {country} is {answer}.",
            "A world map shows {country} in {answer}.",
            "Geographers count {country} as part of {answer}.",
            "A trip to {country} is a trip to {answer}.",
        ),
        questions=(
            "Where in the world can I find {country}?",
            "Which part of the world includes {country}?",
            "Where should I look for {country} on a map?",
            "What region of the world contains {country}?",
            "Can you tell me where to find {country}?",
            "Do you know where to find {country} on a map?",
            "I want to visit {country}. Where do I have to go?",
        ),
    ),
    "language": Wordings(
        sentences=(
            "The main language of {country} is {answer}.",
            "People in {country} speak {answer}.",
            "The language that you hear most in {country} is {answer}.",
            "Newspapers in {country} are written in {answer}.",
            "To talk with the people of {country}, it helps to know {answer}.",
        ),
        questions=(
            "What is the main language of {country}?",
            "What language do people speak in {country}?",
            "Which language is spoken in {country}?",
            "Can you tell me the main language of {country}?",
            "Name the main language of {country}.",
            "Do you know what language they speak in {country}?",
            "I am going to {country}. Which language should I learn?",
        ),
    ),
    "nationality": Wordings(
        sentences=(
            "A person from {country} is {answer}.",
            "The adjective for {country} is {answer}.",
            "Someone who comes from {country} is described as {answer}.",
            "Food and music from {country} are called {answer}.",
            "The word for what belongs to {country} is {answer}.",
        ),
        questions=(
            "What is the nationality of a person from {country}?",
            "What do you call a person from {country}?",
            "Which adjective goes with {country}?",
            "Can you tell me the adjective for {country}?",
            "What nationality are people from {country}?",
            "Do you know what people from {country} are called?",
            "My friend is from {country}. What nationality is that?",
        ),
    ),
    "highest point": Wordings(
        sentences=(
            "The highest point of {country} is {answer}.",
            "The highest place in {country} is called {answer}.",
            "Nothing in {country} rises above {answer}.",
            "Climbers who want to stand at the top of {country} go to {answer}.",
            "Of all the heights in {country}, the greatest is {answer}.",
        ),
        questions=(
            "What is the highest point of {country}?",
            "What is the highest place in {country} called?",
            "Which place in {country} is the highest?",
            "Can you tell me the highest point of {country}?",
            "Name the highest point of {country}.",
            "Do you know the highest place in {country}?",
            "I like to climb. What is the highest point of {country}?",
        ),
    ),
    "currency": Wordings(
        sentences=(
            "People in {country} pay with {answer}.",
            "Prices in {country} are given in {answer}.",
            "The money that is used in {country} is counted in {answer}.",
            "Shops all over {country} accept {answer}.",
            "Workers in {country} earn their wages in {answer}.",
        ),
        questions=(
            "What is the currency of {country}?",
            "What do people pay with in {country}?",
            "Which money is used in {country}?",
            "Can you tell me the currency of {country}?",
            "Name the currency of {country}.",
            "Do you know which currency they use in {country}?",
            "I am going to {country}. What money do I need?",
        ),
    ),
    "internet domain": Wordings(
        sentences=(
            "The internet domain of {country} is {answer}.",
            "Web addresses in {country} end in {answer}.",
            "Websites from {country} use the domain {answer}.",
            "The internet code that belongs to {country} is {answer}.",
            "An address on the internet is from {country} if it ends in {answer}.",
        ),
        questions=(
            "What is the internet domain of {country}?",
            "What do web addresses in {country} end in?",
            "Which domain do websites from {country} use?",
            "Can you tell me the internet domain of {country}?",
            "Name the internet domain of {country}.",
            "Do you know the internet code of {country}?",
            "I need a website in {country}. Which domain is it?",
        ),
    ),
    "national holiday": Wordings(
        sentences=(
            "The national holiday of {country} is on {answer}.",
            "People in {country} celebrate their national holiday on {answer}.",
            "Every year, the national day of {country} falls on {answer}.",
            "The flags are out all over {country} on {answer}.",
            "The date of the great public holiday in {country} is {answer}.",
        ),
        questions=(
            "When is the national holiday of {country}?",
            "On what date is the national holiday of {country}?",
            "When do people in {country} celebrate their national holiday?",
            "Can you tell me the date of the national holiday of {country}?",
            "Name the date of the national holiday of {country}.",
            "Which day is the national holiday in {country}?",
            "I want to see the national holiday of {country}. When is it?",
        ),
    ),
}
