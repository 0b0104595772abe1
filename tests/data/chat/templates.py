"""Chat templates in the manner of well-known families, with generation blocks, and conversations for them.

TEMPLATES are eight shapes that differ in what decides a mask: markers of roles as special tokens or as plain text, the
end of turn as a token of its own or as EOS, white space around the content, a system prompt that moves into the first
turn of the user, tool calls, and thinking that is kept in the last turn only.
"""

import re

CHATML = """{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

HEADERS = """{{ bos_token }}{% for m in messages %}
{%- set head = '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' %}{{ head }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{{ '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

INSTRUCTIONS = """{{ bos_token }}{% if messages[0].role == 'system' %}
{%- set system = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{%- for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') }}
{{- m.content + ' [/INST]' }}{% else %}
{%- generation %}{{ ' ' + m.content | trim + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""

PIPES = """{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}{{ '\\n' }}
{%- else %}{{ m.content + '<|end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{# <|user|> <|system|> <|tool|> #}"""

PLAIN_WORDS = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ 'USER: ' + m.content + ' ASSISTANT:' }}
{%- elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}
{%- else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"""

HASHES = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}
{%- elif m.role == 'user' %}{{ '### Instruction:\\n' + m.content + '\\n\\n' }}
{%- else %}{{ '### Response:\\n' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}
{{- '\\n\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""

TOOLS = """{{ bos_token }}{% if tools %}{{ '<|system|>\\n' + (tools | tojson) + '<|end|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}{{ '<|call|>' + ({'name': call.function.name,
    'arguments': call.function.arguments} | tojson) }}{% endfor %}{{ '<|end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ m.content + '<|end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

THINKING = """{{ bos_token }}{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}
{%- if loop.index0 > ns.last %}{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "instructions": INSTRUCTIONS,
    "pipes": PIPES,
    "plain words": PLAIN_WORDS,
    "hashes": HASHES,
    "tools": TOOLS,
    "thinking": THINKING,
}

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add 2 and 3.\n"},
    {"role": "assistant", "content": "  It is 5, はい。"},
    {"role": "user", "content": "And 1234567 日本?"},
    {"role": "assistant", "content": 'ภาษาไทย 🙂 "quoted"\n\nend '},
]
CALLS = [
    {"role": "user", "content": "Weather in Rome and Oslo?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}}},
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}},
        ],
    },
    {"role": "tool", "name": "weather", "content": "sun"},
    {"role": "tool", "name": "weather", "content": "snow"},
    {"role": "assistant", "content": "Sun in Rome, snow in Oslo."},
]


def without_blocks(template: str) -> str:
    """The same template without generation blocks, but for the text in them."""
    return re.sub(r"\{%-? *(end)?generation *-?%\}", "", template)
