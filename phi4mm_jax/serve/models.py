"""Bodies of requests, as the OpenAPI document describes them.

Keys whose value must be one that changes nothing, such as `frequency_penalty`, are here so that the parser of batch
files refuses any other by name.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(Model):
    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(Model):
    type: Literal["refusal"]
    refusal: str


class ImageURL(Model):
    url: str
    detail: Literal["low", "high", "auto", "original"] | None = None


class ImagePart(Model):
    type: Literal["image_url"]
    image_url: ImageURL | str


class InputImagePart(Model):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["low", "high", "auto", "original"] | None = None


class InputAudio(Model):
    data: str = Field(description="base64, or a data URL")
    format: str | None = Field(None, description="told from the data, whatever this says")


class InputAudioPart(Model):
    type: Literal["input_audio"]
    input_audio: InputAudio


class MediaURL(Model):
    url: str


class AudioPart(Model):
    type: Literal["audio_url"]
    audio_url: MediaURL | str


class VideoURL(Model):
    url: str
    frames: int | None = Field(None, description="taken of it, at most")
    max_crops: int | None = Field(None, description="of each frame")


class VideoPart(Model):
    type: Literal["video_url"]
    video_url: VideoURL | str


Part = Annotated[
    TextPart | RefusalPart | ImagePart | InputImagePart | InputAudioPart | AudioPart | VideoPart,
    Field(discriminator="type"),
]


PART_TYPES = (
    "text", "input_text", "output_text", "refusal", "image_url", "input_image", "input_audio", "audio_url", "video_url"
)  # fmt: skip
PART_MODELS = ("ImageURL", "MediaURL", "VideoURL")


class Message(BaseModel):
    """Other keys, such as those of an answer that is sent back, are ignored unless they look like media."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(Model):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="nothing is added to pieces, whatever this says")


class Drawing(Model):
    """Settings that chats and texts share."""

    model: str | None = Field(None, description="by default the server's own; or a user's adapter")
    max_tokens: int | None = None
    temperature: Number | None = Field(None, description="by default 0, which is greedy")
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    seed: int | None = Field(None, description="by default another one in each request")
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    adapter: str | None = Field(None, description='"none" or the name of one; by default that of the media')
    structured_outputs: dict[str, Any] | None = Field(
        None, description="an object with one of json (a schema), regex, choice, grammar (Lark), json_object (true)"
    )
    draft: str | None = Field(None, description='"lookup", where the server allows it: copies are faster')
    timeout: Number | None = Field(None, description="seconds that the request may take, at most the server's limit")
    user: str | None = None
    metadata: dict[str, Any] | None = None
    presence_penalty: Number | None = Field(None, description="only 0")
    frequency_penalty: Number | None = Field(None, description="only 0")
    logit_bias: dict[str, Any] | None = Field(None, description="only {}")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Drawing):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = Field(
        None, description='"auto", "none", "required" or {"type": "function", "function": {"name": ...}}'
    )
    response_format: dict[str, Any] | None = Field(
        None, description='{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": ...}'
    )
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    modalities: list[str] | None = Field(None, description='only ["text"]')
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(Drawing):
    prompt: str | list[str] = Field(description="raw: special tokens in it are such")
    logprobs: int | None = None
    echo: bool | None = None


class LoadAdapterRequest(Model):
    lora_name: str = Field(description="by which requests ask for it, as their model")
    lora_path: str = Field(description="its folder, within the one that the server allows")


class UnloadAdapterRequest(Model):
    lora_name: str
    lora_int_id: int | None = Field(None, description="has no effect, whatever this says")


class BatchRequest(Model):
    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: str = "24h"
    metadata: dict[str, Any] | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
