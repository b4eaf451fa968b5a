"""The command line: verbs, loaded when they are called, and what becomes of errors.

Exit codes: 0 done, 1 `doctor` found something wrong, 2 a mistake that the user can mend (one line for each on stderr),
130 stopped with Ctrl-C, 143 by SIGTERM; anything else is our own bug and comes with its traceback.
"""

import errno
import importlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

import click

from smidgen.errors import SettingsError, SmidgenError

__all__ = ["VERBS", "main", "smidgen"]

# Order of --help: the way of a newcomer. Each verb is the object of that name in the module of that name.
VERBS = {
    "demo": "Fine-tune a small model in 4 bits, here and now.",
    "plan": "Forecast memory and time of a run; choose settings that fit.",
    "finetune": "Fine-tune a model with LoRA over a quantised base.",
    "generate": "Answer one prompt.",
    "chat": "Talk with a model or a run.",
    "evaluate": "Measure loss, perplexity and answers on held-out data.",
    "report": "Write a page that shows a run: curves, data, answers.",
    "merge": "Write a full model from a run.",
    "export": "Write a run for llama.cpp, Ollama or transformers.",
    "quantize": "Write a model with packed weights: bitsandbytes or GPTQ.",
    "data": "Show how rows become tokens and labels.",
    "download": "Fetch a model into the cache.",
    "doctor": "What this machine can do.",
    "bench": "Measure step, kernels and generation next to other tools.",
}
# Read by libraries when they are loaded. oneDNN keeps a compiled product for each of 1,024 shapes: rows of many lengths
# would let the memory of bfloat16 runs grow by a gigabyte. PyTorch asks for huge pages if told to: half as many page
# faults in a step (docs/log.md). The others keep progress bars and advice out of our output.
_ENVIRONMENT = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "THP_MEM_ALLOC_ENABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_SILENT": "true",
}
_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_OUT_OF_REACH = {errno.EACCES, errno.EPERM, errno.EROFS}


class _Verbs(click.Group):
    """A group that imports a verb's module only when it is called or asked for help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return getattr(importlib.import_module(f"smidgen.cli.{cmd_name}"), cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"no verb {args[0]!r}; there are {', '.join(VERBS)}", ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        from smidgen.cli.console import print_line

        print_line(f"smidgen {version('smidgen')}")
        ctx.exit()


@click.group(
    cls=_Verbs,
    invoke_without_command=True,
    subcommand_metavar="VERB ...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.pass_context
def smidgen(ctx: click.Context) -> None:
    """Fine-tune large language models in 4 bits with LoRA, on the machine you have.

    \b
    Start with:  smidgen demo
    Each verb:   smidgen VERB --help
    """
    if ctx.invoked_subcommand is None:
        from smidgen.cli.console import print_line

        print_line(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and leaves the process with its exit code."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("bitsandbytes", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows '?', and the work goes on
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)
    sys.exit(_run(arguments))


def _end(signum: int, frame: Any) -> None:
    """What is open is closed, and what is temporary goes."""
    raise SystemExit(128 + signum)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = smidgen.main(args=arguments, prog_name="smidgen", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SettingsError as error:
        return _fail(*error.problems)
    except SmidgenError as error:
        return _fail(str(error))
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "smidgen"
        message = error.format_message()
        return _fail(f"{message}{'' if message.endswith(('.', '?')) else '.'} See {path} --help")
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        return 1  # the reader has gone (`smidgen ... | head`), and needs no word about it
    except MemoryError:
        return _fail("out of memory. Try a smaller --micro-batch or --seq-len, or --recompute full")
    except OSError as error:
        if error.errno not in _DISK_FULL | _OUT_OF_REACH:
            raise
        cure = "make room and start again" if error.errno in _DISK_FULL else "choose another place"
        return _fail(f"{error.filename or 'writing'}: {error.strerror}. {cure.capitalize()}")


def _fail(*problems: str) -> int:
    """One line for each problem on stderr; exit code 2."""
    from smidgen.cli.console import print_error

    for problem in problems:
        line = " ".join(problem.split())
        print_error(line if line.endswith((".", "?", "!")) else line + ".")
    return 2
