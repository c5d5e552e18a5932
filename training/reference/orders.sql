CREATE TABLE orders (
    id          INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customers (id),
    placed_at   TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
    total_cents INTEGER NOT NULL CHECK (total_cents >= 0)
);

CREATE INDEX orders_by_customer ON orders (customer_id, placed_at);

SELECT c.name, COUNT(*) AS orders, SUM(o.total_cents) / 100.0 AS spent
FROM customers AS c
JOIN orders AS o ON o.customer_id = c.id
WHERE o.placed_at >= DATE('now', '-30 days')
GROUP BY c.id
HAVING spent > 100
ORDER BY spent DESC
LIMIT 20;
