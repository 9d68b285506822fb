-- One row per scheduled departure; times are New York's. Everything here is known when the plane leaves, except arr_delay,
-- minutes_lost, air_excess and landed_at, which are known when it has landed.
WITH local AS (
  SELECT
    f.*,
    make_timestamp(f.year, f.month, f.day, f.sched_dep_time DIV 100, f.sched_dep_time % 100, 0) AS scheduled_at,
    (f.sched_dep_time DIV 100) * 60 + f.sched_dep_time % 100 AS scheduled_minute,
    (f.sched_arr_time DIV 100) * 60 + f.sched_arr_time % 100 AS arrival_minute,
    -- Hours the destination's clock is behind New York's; four airports in the Caribbean are not in the table and keep its time.
    -5 - coalesce(a.tz, -5) + CASE WHEN a.dst = 'N' THEN 1 ELSE 0 END AS hours_behind,
    coalesce(a.tz, -4) AS dest_zone
  FROM flights AS f
  LEFT JOIN airports AS a ON a.faa = f.dest
),
timed AS (
  SELECT
    *,
    timestampadd(MINUTE, coalesce(dep_delay, 0), scheduled_at) AS departed_at,
    pmod(arrival_minute - scheduled_minute, 1440) + 60 * hours_behind AS block_minutes,
    -- Weather is joined in UTC, where no hour comes twice.
    date_trunc('HOUR', timestampadd(MINUTE, minute + coalesce(dep_delay, 0), time_hour)) AS departed_hour,
    count(*) OVER (PARTITION BY origin, time_hour) AS departures_in_hour
  FROM local
)
SELECT
  t.origin,
  t.dest,
  t.carrier,
  t.flight,
  t.scheduled_at,
  timestampadd(MINUTE, CAST(t.block_minutes + coalesce(t.arr_delay - t.dep_delay, 0) AS INT), t.departed_at) AS landed_at,
  t.arr_delay,
  t.arr_delay - t.dep_delay AS minutes_lost,
  t.air_time - t.block_minutes AS air_excess,
  t.dep_delay,
  t.dest_zone,
  t.block_minutes,
  t.distance,
  t.distance / t.block_minutes AS speed,
  t.scheduled_minute,
  pmod(t.scheduled_minute + t.dep_delay, 1440) AS departure_minute,
  t.departures_in_hour,
  p.seats,
  p.year AS plane_year,
  w.temp,
  w.dewp,
  w.humid,
  w.precip,
  w.pressure,
  w.visib,
  w.wind_speed,
  w.wind_gust,
  w.wind_speed * sin(radians(w.wind_dir)) AS wind_east,
  w.wind_speed * cos(radians(w.wind_dir)) AS wind_north
FROM timed AS t
LEFT JOIN weather AS w ON w.origin = t.origin AND w.time_hour = t.departed_hour
LEFT JOIN planes AS p ON p.tailnum = t.tailnum
