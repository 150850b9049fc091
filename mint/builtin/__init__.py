"""The built-in tasks: tables of facts, and the patients, portraits and tissue tiles that are drawn from them."""
