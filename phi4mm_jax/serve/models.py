"""Bodies of requests, as the OpenAPI document describes them.

Keys whose value must be one that changes nothing, such as `frequency_penalty`, are here so that the parser of batch
files refuses any other by name.
"""

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from phi4mm_jax.adapters import adapter_choices
from phi4mm_jax.processing.video import MAX_FRAMES
from phi4mm_jax.serve.schemas import (
    CHAT,
    COMPLETION,
    MESSAGE,
    RESPONSE_FORMAT,
    STRUCTURED_OUTPUTS,
    TOOL,
    TOOL_CALL,
    TOOL_CHOICE,
)

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
Word = Annotated[int, Field(ge=0, lt=2**31)]  # that a device's integer holds
Temperature = Annotated[float, Field(ge=0, le=1e30)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(lambda count: max(count, 0))]  # -1 is off, as in vLLM
MinP = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=1e-3, le=1e3)]
AdapterName = Annotated[str, WithJsonSchema({"enum": list(adapter_choices())})]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Nothing = Annotated[float, Field(ge=0, le=0)]
Text = Annotated[str, Field(min_length=1)]


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
    frames: Annotated[int, Field(ge=1, le=MAX_FRAMES)] | None = Field(None, description="taken of it, at most")
    max_crops: Positive | None = Field(None, description="of each frame")


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


ToolCall = Annotated[dict[str, Any], WithJsonSchema(TOOL_CALL)]


class Message(BaseModel):
    """Other keys, such as those of an answer that is sent back, are ignored unless they look like media."""

    model_config = ConfigDict(extra="allow", json_schema_extra=MESSAGE)
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = Field(None, description="only an answer that calls tools may have none")
    tool_calls: list[ToolCall] | None = Field(None, description="of an assistant's message")
    tool_call_id: str | None = None


class StreamOptions(Model):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="nothing is added to pieces, whatever this says")


class SamplingOptions(Model):
    """Settings that chats and texts share."""

    model: str | None = Field(None, description="by default the server's own; or a user's adapter")
    max_tokens: Positive | None = None
    temperature: Temperature | None = Field(None, description="by default 0, which is greedy")
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Word | None = Field(None, description="by default another one in each request")
    n: Positive | None = None
    use_beam_search: bool | None = Field(None, description="`n` answers by beam search, the likeliest first")
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = Field(None, description="of a beam search")
    stop: Text | list[Text] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    adapter: AdapterName | None = Field(None, description="by default that of the media")
    structured_outputs: Annotated[dict[str, Any], WithJsonSchema(STRUCTURED_OUTPUTS)] | None = Field(
        None, description="not beside response_format"
    )
    draft: Literal["lookup"] | None = Field(None, description='"lookup", where the server allows it: copies are faster')
    timeout: Seconds | None = Field(None, description="seconds that the request may take, at most the server's limit")
    user: str | None = None
    metadata: dict[str, Any] | None = None
    presence_penalty: Nothing | None = None
    frequency_penalty: Nothing | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def include_usage(self) -> bool:
        """Return whether a stream ends with the count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(SamplingOptions):
    model_config = ConfigDict(json_schema_extra=CHAT)
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: list[Annotated[dict[str, Any], WithJsonSchema(TOOL)]] | None = None
    tool_choice: Annotated[str | dict[str, Any], WithJsonSchema(TOOL_CHOICE)] | None = Field(
        None, description='"required" and a name need `tools`'
    )
    response_format: Annotated[dict[str, Any], WithJsonSchema(RESPONSE_FORMAT)] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = Field(None, description="true, or false with continue_final_message")
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(SamplingOptions):
    model_config = ConfigDict(json_schema_extra=COMPLETION)
    prompt: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        description="raw: special tokens in it are such, and none stands for a medium"
    )
    logprobs: Annotated[int, Field(ge=0)] | None = None
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
    completion_window: Annotated[str, Field(description="has no effect, whatever this says")] = "24h"
    metadata: dict[str, Any] | None = None


class FileForm(Model):
    file: UploadFile = Field(description="requests, one JSON object a line")
    purpose: Literal["batch"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
