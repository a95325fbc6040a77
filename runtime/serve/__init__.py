"""`llmc serve`: an artifact behind HTTP, in the form of OpenAI's API.

    app ──► requests, formats, chat ──► engine ──► batch ──► llmc.runtime
     └────► replies, tools                           └────► job, pages, probs

server.py starts it; app.py is HTTP, on an event loop; engine.py owns the model, on a thread of its own.  Needs the
extra llmc[serve]: starlette and uvicorn in app.py, transport.py, connections.py and server.py, jinja2 in chat.py.
"""
