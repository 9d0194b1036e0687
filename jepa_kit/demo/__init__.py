"""A page that runs a trained network in the browser: its data (export.py), and one HTML file of all (page.py).

static/ has the JavaScript modules, of which only app.js touches the document; the others also run in Node.
"""
