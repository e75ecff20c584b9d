"""The MCP face: `chiplog serve` offers every function of `tools.TOOLS` over stdio.

Each is wrapped the same way: unknown arguments are refused, progress is reported, a ChiplogError's words reach the
model, and what needs a yes asks the user where the client can, else tells the model to ask.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import signal
from types import FrameType
from typing import Any, NoReturn

import anyio
import anyio.from_thread
import anyio.to_thread
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool as McpTool
from mcp_types import (
    CallToolResult,
    ElicitRequest,
    ElicitRequestFormParams,
    ElicitResult,
    InputRequiredResult,
    TextContent,
    ToolAnnotations,
)
from mcp_types.version import is_version_at_least
from pydantic import BaseModel, ConfigDict, Field

from chiplog import __version__
from chiplog.answers import Answer
from chiplog.errors import ChiplogError, ConfirmationNeeded, in_words
from chiplog.render import WRITING
from chiplog.tools import TOOLS, Tool

INSTRUCTIONS = """chiplog plans machine-learning experiments from what past jobs actually did.
The usual order: check_dataset and check_model, plan_experiment, show its table to the user, setup_experiment_dirs,
submit_experiment (ask the user first), experiment_status until the jobs have ended, summarize_experiment.
Never invent a time or a memory figure: where an estimate has no evidence, say so and offer the probe."""

# From this protocol version on, a tool asks by answering with what it needs to know.
ASKS_BY_ANSWER = "2026-07-28"


class Consent(BaseModel):
    """What the user is asked for."""

    agreed: bool = Field(description="Yes, go ahead.")


def build_server() -> MCPServer:
    """The server with all tools."""
    return MCPServer("chiplog", version=__version__, instructions=INSTRUCTIONS, tools=[_wrap(tool) for tool in TOOLS])


def serve() -> None:
    """Serves over stdio until the client leaves."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _leave)
    build_server().run("stdio")


def _leave(number: int, _: FrameType | None) -> NoReturn:
    """Ends the process once no tool is midst a write; it cannot unwind, since a thread waits for the client's words."""
    with WRITING:
        os._exit(128 + number)


def _wrap(tool: Tool) -> McpTool:
    function = tool.function
    signature = inspect.signature(function, eval_str=True)
    reports = "progress" in signature.parameters

    async def call(ctx: Context, **arguments: Any) -> Any:
        if reports:
            arguments["progress"] = functools.partial(_report, ctx)
        try:
            return _result(await _in_thread(functools.partial(function, **arguments)))
        except ConfirmationNeeded as question:
            return await _ask(ctx, str(question), functools.partial(function, **{**arguments, "confirm": True}))
        except (ChiplogError, OSError, UnicodeDecodeError) as error:
            raise ToolError(in_words(error)) from error

    kept = [parameter for name, parameter in signature.parameters.items() if name != "progress"]
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=Context)
    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.__signature__ = signature.replace(parameters=[*kept, context])  # pyright: ignore[reportFunctionMemberAccess]
    call.__annotations__ = {p.name: p.annotation for p in [*kept, context]} | {"return": signature.return_annotation}
    wrapped = McpTool.from_function(
        call,
        annotations=ToolAnnotations(
            title=function.__name__.replace("_", " "),
            read_only_hint=tool.reads_only,
            destructive_hint=tool.destroys,
            idempotent_hint=tool.idempotent,
            open_world_hint=False,
        ),
    )
    return _forbid_unknown(wrapped)


def _forbid_unknown(tool: McpTool) -> McpTool:
    """The SDK drops unknown arguments silently: a misspelt one would be a run that nobody asked for."""
    accepted = tool.fn_metadata.arg_model
    strict = type(accepted.__name__, (accepted,), {"model_config": ConfigDict(extra="forbid"), "__module__": __name__})
    tool.fn_metadata.arg_model = strict
    return tool.model_copy(update={"parameters": strict.model_json_schema(by_alias=True)})


def _result(answer: Answer) -> CallToolResult:
    """The summary as text, once; everything as structured content."""
    text = "\n".join([answer.summary, *(f"next: {step}" for step in answer.next)])
    structured = _finite(answer.model_dump(mode="json"))
    return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=structured)


def _finite(value: Any) -> Any:
    """The value without NaN and infinity, which JSON does not have; in records and logs they stay."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _report(ctx: Context, done: float, total: float | None, words: str) -> None:
    """Called on the tool's worker thread."""
    anyio.from_thread.run(ctx.report_progress, done, total, words)


async def _ask(ctx: Context, question: str, go_on: functools.partial[Any]) -> Any:
    """Puts the question to the user through the client; a client that cannot ask gets words for the model."""
    capabilities = ctx.client_capabilities
    if capabilities is None or capabilities.elicitation is None:
        raise ToolError(f"{question}\nAsk the user; if they agree, call again with confirm=true.")
    if ctx.protocol_version and is_version_at_least(ctx.protocol_version, ASKS_BY_ANSWER):
        answer = (ctx.input_responses or {}).get("consent")
        if not isinstance(answer, ElicitResult) or ctx.request_state != question:  # a yes to another question is none
            form = ElicitRequestFormParams(message=question, requested_schema=Consent.model_json_schema())
            return InputRequiredResult(input_requests={"consent": ElicitRequest(params=form)}, request_state=question)
        agreed = answer.action == "accept" and bool((answer.content or {}).get("agreed"))
    else:
        reply = await ctx.elicit(question, Consent)
        agreed = reply.action == "accept" and reply.data.agreed
    if not agreed:
        raise ToolError(f"The user did not agree. The question was: {question}")
    try:
        return _result(await _in_thread(go_on))
    except (ChiplogError, OSError, UnicodeDecodeError) as error:
        raise ToolError(in_words(error)) from error


async def _in_thread(call: functools.partial[Any]) -> Any:
    """Runs a tool beside the server's loop; a client that leaves does not wait for it."""
    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)
