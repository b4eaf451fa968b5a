"""Small tokenizers for the data tests, made by hand, and two chat templates as real models have them."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# no system messages, strict turns, answers end with eos
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

# a past answer loses its <think> part, as Qwen3 has it
THINKING = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{{ '<|im_start|>assistant\n' + message['content'].split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# the generation prompt opens a <think> that written answers do not have, as DeepSeek-R1 has it
OPENING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}")

# turns are headed by words and end with a line break, no token
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

_SPECIALS = ["<pad>", "<s>", "</s>"]
_CHATML_SPECIALS = ["<|im_start|>", "<|im_end|>"]


def word_tokenizer(template: str | None = None, *, chatml: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a word, a sign, or a character of white space. bos: the tokenizer itself puts <s> in front."""
    roles = ["user", "assistant", "system", "tool", "INST"]
    words = [*roles, *"/[]:", "hi", "hello", "there", "bye", "one", "two", "three", "be", "brief", "yes", "no", "a"]
    specials = _SPECIALS + (_CHATML_SPECIALS if chatml else [])
    pieces = [*specials, "<unk>", " ", "\n", *words]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s|\w+|[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(specials)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(tokenizer, template)


def joining_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """One token a character, except that two line breaks become one token, and so do ':' and 'a'."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    pieces = [*_SPECIALS, *_CHATML_SPECIALS, *characters, "\n\n", ":a"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("\n", "\n"), (":", "a")]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(_SPECIALS + _CHATML_SPECIALS)
    return _wrap(tokenizer, template)


def _wrap(tokenizer: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.chat_template = template
    return wrapped
