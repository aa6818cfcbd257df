"""The Settings page: folders, token, look and language, messages at the end of a run, and this machine."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any, Final

import gradio as gr

from fluxgui.form_parts import PLAIN, html_part
from fluxgui.language import NAMES, language, say
from fluxgui.machine import about, examine, try_out_notifications
from fluxgui.models_card import build_models_card
from fluxgui.presets import USUAL_START
from fluxgui.train_tab import TrainTab
from trainer.schema.base import UserError
from trainer.schema.folders import data_home
from trainer.schema.presets import list_presets
from trainer.schema.settings import (
    THEMES,
    change_settings,
    has_saved_token,
    read_settings,
    save_hub_token,
    token_of_environment,
)

QUIETLY: Final[dict[str, Any]] = {"show_progress": "hidden", "concurrency_limit": 8}
FOLDERS: Final = {"models_dir": "models", "datasets_dir": "datasets", "runs_dir": "runs"}

SHOW_THEME: Final = """(theme) => {
    try { localStorage.setItem("fluxgui-theme", theme); } catch (error) {}
    const dark = theme === "dark" || (theme === "system" && matchMedia("(prefers-color-scheme: dark)").matches);
    document.body.classList.toggle("dark", dark);
    const url = new URL(location.href);
    if (theme === "system") url.searchParams.delete("__theme");
    else url.searchParams.set("__theme", theme);
    history.replaceState(null, "", url);
}"""
ASK_TO_NOTIFY: Final = """async (wanted) => {
    try { localStorage.setItem("fluxgui-notify", wanted ? "1" : "0"); } catch (error) {}
    if (!wanted) return "";
    const answer = "Notification" in window ? await Notification.requestPermission() : "denied";
    return answer;
}"""


def build_settings_tab(train: TrainTab, tabs: gr.Tabs, page: gr.Tab) -> None:
    """Lay the page out. Call inside its `gr.Tab`, which is given so that a visit shows what holds then."""
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            folders = _build_folders()
            token_status = _build_token()
        with gr.Column(min_width=320):
            look = _build_look()
            notifications = _build_notifications()
    build_models_card(train, tabs, page)
    with gr.Column(elem_classes="card"):
        html_part(_title("settings.about"))
        facts = html_part(elem_id="settings-about")
        check = gr.Button(say("settings.doctor"), size="sm", elem_id="settings-doctor")
        findings = html_part(elem_id="settings-findings")
    check.click(show_findings, None, [findings], show_progress="minimal", concurrency_limit=1)

    def arrive() -> list[object]:
        settings = read_settings()
        return [
            *(str(getattr(settings, name) or "") for name in FOLDERS),
            "\n".join(map(str, settings.allowed_dirs)),
            show_token(),
            settings.theme,
            settings.language or language(),
            gr.update(choices=_start_choices(), value=settings.start_preset or USUAL_START),
            settings.notify_browser,
            "\n".join(settings.notify_command),
            settings.notify_webhook or "",
            show_about(),
        ]

    page.select(arrive, None, [*folders, token_status, *look, *notifications, facts], **QUIETLY)


def _build_folders() -> list[gr.Textbox]:
    with gr.Column(elem_classes="card"):
        html_part(_title("settings.folders", "settings.folders_help"))
        boxes = [
            gr.Textbox(
                label=say(f"settings.{name}"),
                placeholder=str(data_home() / usual),
                max_lines=1,
                html_attributes=PLAIN,
                elem_id=f"settings-{name}",
            )
            for name, usual in FOLDERS.items()
        ]
        allowed = gr.Textbox(
            label=say("settings.allowed_dirs"),
            info=say("settings.allowed_help"),
            lines=2,
            max_lines=10,
            elem_id="settings-allowed_dirs",
        )
        save = gr.Button(say("settings.save"), size="sm", variant="primary", elem_id="settings-save-folders")
    save.click(save_folders, [*boxes, allowed], None, **QUIETLY)
    return [*boxes, allowed]


def _build_token() -> gr.HTML:
    with gr.Column(elem_classes="card"):
        html_part(_title("settings.token", "settings.token_help"))
        status = html_part(show_token(), elem_id="settings-token-status")
        token = gr.Textbox(
            label=say("settings.token_label"),
            type="password",
            max_lines=1,
            html_attributes=PLAIN,
            elem_id="settings-token",
        )
        with gr.Row():
            keep = gr.Button(say("settings.token_save"), size="sm", variant="primary", elem_id="settings-token-keep")
            forget = gr.Button(say("settings.token_forget"), size="sm", elem_id="settings-token-forget")
    # The box is emptied at once, so that the token does not stay in the page.
    keep.click(keep_token, [token], [token, status], **QUIETLY)
    forget.click(lambda: keep_token(""), None, [token, status], **QUIETLY)
    return status


def _build_look() -> tuple[gr.Radio, gr.Dropdown, gr.Dropdown]:
    with gr.Column(elem_classes="card"):
        html_part(_title("settings.look"))
        theme = gr.Radio(
            [(say(f"settings.theme_{each}"), each) for each in THEMES],
            label=say("settings.theme"),
            elem_id="settings-theme",
        )
        chosen = gr.Dropdown(
            [(name, code) for code, name in NAMES.items()],
            label=say("settings.language"),
            info=say("settings.language_help"),
            filterable=False,
            elem_id="settings-language",
        )
        start = gr.Dropdown(
            _start_choices(),
            label=say("settings.start_preset"),
            info=say("settings.start_preset_help"),
            filterable=False,
            elem_id="settings-start_preset",
        )
    start.input(lambda value: _change(start_preset=value), [start], None, **QUIETLY)
    theme.input(lambda value: _change(theme=value), [theme], None, **QUIETLY)
    theme.input(None, [theme], None, js=SHOW_THEME)
    chosen.input(lambda value: _change(language=value), [chosen], None, **QUIETLY)
    return theme, chosen, start


def _build_notifications() -> tuple[gr.Checkbox, gr.Textbox, gr.Textbox]:
    with gr.Column(elem_classes="card"):
        html_part(_title("settings.notifications"))
        browser = gr.Checkbox(
            label=say("settings.notify_browser"), info=say("settings.notify_browser_help"), elem_id="settings-notify"
        )
        answer = gr.Textbox(visible=False)
        command = gr.Textbox(
            label=say("settings.notify_command"),
            info=say("settings.notify_command_help"),
            lines=2,
            max_lines=8,
            elem_id="settings-notify-command",
        )
        webhook = gr.Textbox(
            label=say("settings.notify_webhook"),
            info=say("settings.notify_webhook_help"),
            max_lines=1,
            html_attributes=PLAIN,
            elem_id="settings-notify-webhook",
        )
        with gr.Row():
            save = gr.Button(
                say("settings.save"), size="sm", variant="primary", min_width=80, elem_id="settings-save-notifications"
            )
            trial = gr.Button(say("settings.try"), size="sm", min_width=80, elem_id="settings-try-notifications")

    def tell(permission: str) -> None:
        if permission == "denied":
            gr.Warning(say("settings.notify_blocked"))

    browser.input(lambda value: _change(notify_browser=value), [browser], None, **QUIETLY)
    browser.input(None, [browser], [answer], js=ASK_TO_NOTIFY).then(tell, [answer], None, **QUIETLY)
    save.click(save_notifications, [command, webhook], None, **QUIETLY)
    trial.click(try_notifications, [command, webhook], None, show_progress="minimal", concurrency_limit=1)
    return browser, command, webhook


def save_folders(models: str | None, datasets: str | None, runs: str | None, allowed: str | None) -> None:
    chosen = {name: _folder(text) for name, text in zip(FOLDERS, (models, datasets, runs), strict=True)}
    lines = [line for line in (allowed or "").splitlines() if line.strip()]
    _change(**chosen, allowed_dirs=tuple(path for line in lines if (path := _folder(line)) is not None))
    gr.Info(say("settings.saved"))


def save_notifications(command: str | None, webhook: str | None) -> None:
    words = tuple(line.strip() for line in (command or "").splitlines() if line.strip())
    _change(notify_command=words, notify_webhook=(webhook or "").strip() or None)
    gr.Info(say("settings.saved"))


def try_notifications(command: str | None, webhook: str | None) -> None:
    """Save them, and let the trainer's program use them once."""
    save_notifications(command, webhook)
    if not (command or "").strip() and not (webhook or "").strip():
        raise gr.Error(say("settings.nothing_to_try"), print_exception=False)
    problem = try_out_notifications()
    if problem is not None:
        raise gr.Error(say("settings.not_told", reason=problem), print_exception=False)
    gr.Info(say("settings.told"))


def keep_token(token: str | None) -> tuple[str, str]:
    """Empties the box and says what holds now."""
    try:
        save_hub_token(token or "")
    except (OSError, UserError) as error:
        raise _not_saved(error) from None
    return "", show_token()


def show_token() -> str:
    if token_of_environment():
        text = say("settings.token_environment")
    else:
        text = say("settings.token_there") if has_saved_token() else say("settings.token_none")
    return f'<p role="status">{escape(text)}</p>'


def show_about() -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in about())
    return f'<div class="settings-table about"><table>{rows}</table></div>'


def show_findings() -> str:
    found = examine()
    marks = {"good": "✓", "warn": "!", "bad": "✗"}
    boxes = "".join(
        f'<div class="box {each.verdict}"><strong>{marks[each.verdict]} {escape(each.text)}</strong>'
        f"{f'<p>{escape(each.remedy)}</p>' if each.remedy else ''}</div>"
        for each in sorted(found, key=lambda each: ("bad", "warn", "good").index(each.verdict))
    )
    good = "" if any(each.verdict != "good" for each in found) else f"<p>{escape(say('settings.doctor_good'))}</p>"
    return f'<div role="status">{good}{boxes}</div>'


def _start_choices() -> list[tuple[str, str]]:
    return [(preset.title, preset.name) for preset in list_presets() if preset.kind in ("purpose", "own")]


def _folder(text: str | None) -> Path | None:
    stripped = (text or "").strip().strip("\"'")
    return Path(stripped).expanduser() if stripped else None


def _change(**changes: Any) -> None:
    try:
        change_settings(**changes)
    except (OSError, UserError) as error:
        raise _not_saved(error) from None


def _not_saved(error: Exception) -> gr.Error:
    return gr.Error(say("settings.not_saved", reason=error), print_exception=False)


def _title(title: str, help_text: str | None = None) -> str:
    more = f"<p>{escape(say(help_text))}</p>" if help_text else ""
    return f'<div class="card-title"><h2>{escape(say(title))}</h2>{more}</div>'
