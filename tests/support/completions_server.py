"""A small completions server over a real model: what vLLM answers, or text alone, and what can go wrong on the way."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from tokenry.decode import DecodeLoop, Job, TransformersEngine


class CompletionsServer(ThreadingHTTPServer):
    """`faults` are answered first, one a request to /v1/completions: (status, headers, body), "drop", or seconds of
    sleep before the true answer. `requests` holds the bodies that came, `gone` counts clients that left early. Where it
    streams, it waits `pause` seconds before each token, and `sent` counts tokens."""

    daemon_threads = True

    def __init__(self, model, tokenizer, tells_ids=True, key=None, window=None, streams=False):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer, self.tells_ids, self.key, self.window = model, tokenizer, tells_ids, key, window
        self.faults, self.requests, self.gone, self.lock = [], [], 0, threading.Lock()
        self.streams, self.pause, self.sent = streams, 0.0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def completion(self, body):
        prompt = body["prompt"]
        ids = self.tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt
        scores, bias = [], {int(token): value for token, value in body.get("logit_bias", {}).items()}

        def biased(_, logits):
            scores.append(logits.log_softmax(-1)[0])
            logits = logits.clone()
            for token, value in bias.items():
                logits[:, token] += value
            return logits / (body["temperature"] or 1.0)

        job = Job(torch.tensor([ids]), body["max_tokens"], do_sample=body["temperature"] > 0, seed=body.get("seed"))
        job = Job(**{**vars(job), "eos_ids": (self.tokenizer.eos_token_id,)})
        with self.lock, torch.no_grad():
            loop = DecodeLoop(TransformersEngine(self.model), job)
            loop.processors.append(biased)
            new = loop.generate().new_ids[0]
        ended = new[-1] == self.tokenizer.eos_token_id
        choice = {
            "index": 0,
            "text": self.tokenizer.decode(new, skip_special_tokens=True),
            "finish_reason": "stop" if ended else "length",
            "logprobs": None,
        }
        if self.tells_ids and body.get("return_token_ids"):
            choice["token_ids"] = new
            if body.get("logprobs"):
                choice["logprobs"] = {
                    "token_logprobs": [float(values[token]) for token, values in zip(new, scores)],
                    "top_logprobs": [_likeliest(values, body["logprobs"]) for values in scores],
                }
        return {"object": "text_completion", "choices": [choice]}


def _likeliest(scores, count):
    best = scores.topk(count)
    return {f"token_id:{i}": value for i, value in zip(best.indices.tolist(), best.values.tolist())}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        model = {"id": "tiny", "object": "model"}
        self._answer({"data": [model | ({"max_model_len": self.server.window} if self.server.window else {})]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append(body)
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif isinstance(fault, tuple):
            self._send(*fault)
        elif self.server.key and self.headers["authorization"] != f"Bearer {self.server.key}":
            self._refuse(401, "no such key")
        elif body["model"] != "tiny":
            self._refuse(404, f"The model `{body['model']}` does not exist.")
        elif not self.server.tells_ids and not isinstance(body["prompt"], str):
            self._refuse(400, "prompt must be a text")
        elif fault is None or self._stays(fault):
            answer = self.server.completion(body)
            if self.server.streams and body.get("stream"):
                self._stream(answer["choices"][0])
            else:
                self._answer(answer)

    def _stream(self, whole):
        """The tokens one by one, and how it has ended, until the client has gone."""
        self._send(200, {"content-type": "text/event-stream", "content-length": None, "connection": "close"}, "")
        told = whole["logprobs"] or {}
        for place, token in enumerate(whole["token_ids"]):
            if not self._stays(self.server.pause):
                return
            logprobs = {name: values[place : place + 1] for name, values in told.items()} or None
            self._event({"token_ids": [token], "logprobs": logprobs, "finish_reason": None})
            self.server.sent += 1
        self._event({"text": "", "finish_reason": whole["finish_reason"]})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, choice):
        self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())

    def _stays(self, seconds):
        """Wait; whether the client is still there."""
        end = time.monotonic() + seconds
        self.connection.setblocking(False)
        try:
            while time.monotonic() < end:
                try:
                    if self.connection.recv(1) == b"":
                        self.server.gone += 1
                        self.close_connection = True
                        return False
                except BlockingIOError:
                    time.sleep(0.01)
        finally:
            self.connection.setblocking(True)
        return True

    def _refuse(self, status, message):
        error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
        self._send(status, {}, json.dumps({"error": error}))

    def _answer(self, value):
        self._send(200, {}, json.dumps(value))

    def _send(self, status, headers, text):
        data = text.encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(data)), **headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def completions_server(model, tokenizer, **options):
    server = CompletionsServer(model, tokenizer, **options)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
