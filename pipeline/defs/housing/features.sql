-- One row per city and month. What happened in a month is known at its end, so models see it only through lags and windows.
SELECT
  city,
  make_date(year, month, 1) AS month_start,
  median,
  inventory
FROM txhousing
