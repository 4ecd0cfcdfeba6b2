CREATE ROLE shop_read NOLOGIN;
CREATE ROLE shop_app NOLOGIN;
CREATE ROLE shop_owner NOLOGIN;
CREATE DATABASE shop OWNER shop_owner;
\connect shop
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO shop_read, shop_app;
GRANT ALL ON SCHEMA public TO shop_owner;
SET ROLE shop_owner;
CREATE TABLE users (id bigint PRIMARY KEY, name text NOT NULL, email text NOT NULL UNIQUE, country text);
CREATE TABLE orders (id bigint PRIMARY KEY, user_id bigint NOT NULL REFERENCES users, item text NOT NULL, total numeric NOT NULL);
INSERT INTO users VALUES (1, 'Ada', 'ada@example.com', 'UK'), (2, 'Grace', 'grace@example.com', 'US'), (3, 'Edsger', 'edsger@example.com', 'NL');
INSERT INTO orders VALUES (1, 1, 'difference engine', 1822.00), (2, 2, 'compiler', 1952.50), (3, 3, 'semaphore', 1965.00);
GRANT SELECT ON users, orders TO shop_read, shop_app;
GRANT INSERT, UPDATE ON orders TO shop_app;
